"""Reading of tiktoken.model, the vocabulary file of the Kimi K2 family. Knows nothing of the model that uses it."""

import base64
import binascii
from collections.abc import Callable, Mapping

import msgspec
import tiktoken

from mlx_k2.errors import TokenizerError
from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import read_json

FILE = "tiktoken.model"

# The pattern of the pieces that are encoded separately: Han runs, words with an optional leading mark and an English
# contraction, up to three digits, punctuation, line ends, other space. `&&` is Rust's intersection of classes.
_PIECES = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Kimi-K2-Thinking is trained to write these two as single tokens, but its tokenizer_config.json may not name them.
# The later models of the family share its vocabulary and do name them.
_K2_NUM_RANKS = 163_584
_K2_UNNAMED = {"<think>": 163_606, "</think>": 163_607}


class Vocabulary(msgspec.Struct, frozen=True):
    """The tokens that one set of files defines, and the encoder of ordinary text.

    ``encode_ordinary`` takes well-formed text and returns ids of ``ordinary`` only, for any text.
    """

    encode_ordinary: Callable[[str], list[int]]
    ordinary: Mapping[int, bytes]
    """The bytes of each ordinary token, by id."""
    special: dict[str, int]
    """The ids of the control tokens, by name."""


class _AddedToken(msgspec.Struct, frozen=True):
    content: str


class _TokenizerConfig(msgspec.Struct, frozen=True):
    added_tokens_decoder: dict[int, _AddedToken] = {}


def read_tiktoken(model: bytes, tokenizer_config: bytes, vocab_size: int) -> Vocabulary:
    """Return the vocabulary of tiktoken.model, with control tokens named by tokenizer_config.json.

    Raises:
        TokenizerError: a file is malformed; names the file, the line in tiktoken.model, and the problem.
    """
    ranks = _ranks(model, vocab_size)
    special = _named_tokens(tokenizer_config)
    if len(ranks) == _K2_NUM_RANKS:
        used = set(special.values())
        unnamed = {name: number for name, number in _K2_UNNAMED.items() if number not in used}
        special = unnamed | special
    # tiktoken gets no special tokens, so that it cannot produce one from text.
    encoding = tiktoken.Encoding("kimi-k2", pat_str=_PIECES, mergeable_ranks=ranks, special_tokens={})
    return Vocabulary(encoding.encode_ordinary, {rank: token for token, rank in ranks.items()}, special)


def _ranks(model: bytes, vocab_size: int) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    for number, line in enumerate(model.splitlines(), start=1):
        if not line:
            continue
        token, rank = _token_and_rank(line, number)
        if rank >= vocab_size:
            raise TokenizerError(f"{FILE} line {number}: rank {rank} is outside the vocabulary of {vocab_size} tokens")
        if token in ranks or rank in seen:
            what = f"token {token!r}" if token in ranks else f"rank {rank}"
            raise TokenizerError(f"{FILE} line {number}: {what} occurs twice")
        ranks[token] = rank
        seen.add(rank)
    if missing := set(range(len(ranks))) - seen:
        raise TokenizerError(f"{FILE}: rank {min(missing)} is missing")
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise TokenizerError(f"{FILE}: no token for the single byte 0x{byte:02x}, so not every text can be encoded")
    return ranks


def _token_and_rank(line: bytes, number: int) -> tuple[bytes, int]:
    fields = line.split()
    if len(fields) != 2 or not fields[1].isdigit():
        raise TokenizerError(f"{FILE} line {number}: not a base64 token and its rank: {line[:60]!r}")
    try:
        return base64.b64decode(fields[0], validate=True), int(fields[1])
    except binascii.Error:
        raise TokenizerError(f"{FILE} line {number}: {fields[0][:60]!r} is not base64") from None


def _named_tokens(tokenizer_config: bytes) -> dict[str, int]:
    """Return the control tokens that tokenizer_config.json names in added_tokens_decoder.

    Raises:
        TokenizerError: the file is malformed, or a name is empty or has two ids.
    """
    try:
        config = read_json(tokenizer_config, _TokenizerConfig)
    except JsonError as error:
        raise TokenizerError(f"tokenizer_config.json: {error}") from None
    names: dict[str, int] = {}
    for token_id, token in config.added_tokens_decoder.items():
        if not token.content:
            raise TokenizerError(f"special token {token_id} has an empty name")
        if names.setdefault(token.content, token_id) != token_id:
            raise TokenizerError(f"special token {token.content!r} has two ids, {names[token.content]} and {token_id}")
    return names
