"""Reads tokenizer.json, a byte-level BPE of Hugging Face's tokenizers. Knows nothing of the model behind it."""

from typing import Any

import msgspec
import tokenizers

from mlx_k2.errors import TokenizerError
from mlx_k2.text.vocabulary import Vocabulary, unique_names

FILE = "tokenizer.json"


class _AddedToken(msgspec.Struct, frozen=True):
    id: int
    content: str


class _Bpe(msgspec.Struct, frozen=True):
    vocab: dict[str, int]
    merges: list[str | tuple[str, str]]
    type: str = "BPE"


class _TokenizerJson(msgspec.Struct, frozen=True):
    model: _Bpe
    added_tokens: list[_AddedToken] = []


def read_tokenizer_json(data: bytes, vocab_size: int) -> Vocabulary:
    """The vocabulary of tokenizer.json; its added tokens are the control tokens.

    Raises:
        TokenizerError: the file is malformed, not a byte-level BPE, or larger than the model's vocabulary.
    """
    try:
        parsed = msgspec.json.decode(data, type=_TokenizerJson)
    except (msgspec.DecodeError, ValueError) as error:
        raise TokenizerError(f"{FILE} is not a BPE tokenizer: {error}") from None
    if parsed.model.type != "BPE":
        raise TokenizerError(f"{FILE}: a {parsed.model.type} model; only byte-level BPE is read")
    special = unique_names([(token.content, token.id) for token in parsed.added_tokens])
    ordinary = _ordinary(parsed.model.vocab, special, vocab_size)
    encoder = _without_added_tokens(data, special)

    def encode_ordinary(text: str) -> list[int]:
        return list(encoder.encode(text, add_special_tokens=False).ids)

    return Vocabulary(encode_ordinary, ordinary, special)


def _ordinary(vocab: dict[str, int], special: dict[str, int], vocab_size: int) -> dict[int, bytes]:
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    ordinary = {}
    for token, number in vocab.items():
        if not 0 <= number < vocab_size:
            raise TokenizerError(f"{FILE}: token id {number} is outside the vocabulary of {vocab_size} tokens")
        if token in special:
            continue
        if not byte_of.keys() >= set(token):
            raise TokenizerError(f"{FILE}: {token!r} is no byte-level token; only byte-level BPE is read")
        ordinary[number] = bytes(byte_of[character] for character in token)
    missing = byte_of.keys() - vocab.keys()
    if missing:
        raise TokenizerError(f"{FILE}: {len(missing)} of the 256 bytes have no token, so not every text can be encoded")
    return ordinary


def _without_added_tokens(data: bytes, special: dict[str, int]) -> tokenizers.Tokenizer:
    """The tokenizer with no way left to yield a special token, to cut the text short or to add to it."""
    fields: dict[str, Any] = msgspec.json.decode(data)
    model = fields["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in special}
    model["merges"] = [merge for merge in model["merges"] if special.keys().isdisjoint(_merged(merge))]
    fields |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    try:
        return tokenizers.Tokenizer.from_buffer(msgspec.json.encode(fields))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise TokenizerError(f"{FILE}: {error}") from None


def _merged(merge: str | list[str]) -> set[str]:
    """A merge's two halves and what they make; a file holds them as "a b" or as ["a", "b"]."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return {left, right, left + right}


def _byte_characters() -> list[str]:
    """The character that stands for each byte: itself where it prints in Latin-1, else the next one from U+0100."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]
