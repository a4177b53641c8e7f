import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlx_k2.errors import TokenizerError
from mlx_k2.text.tokenizer import load_tokenizer

LETTERS = pre_tokenizers.ByteLevel.alphabet()
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("<", "|")]


def tokenizer_json(**changes: Any) -> bytes:
    """A byte-level BPE made by the library itself; "[EOS]" is both in its vocabulary and an added token."""
    vocab = {letter: number for number, letter in enumerate(sorted(LETTERS))}
    for left, right in [*MERGES, ("[EO", "S]")]:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>", "[EOS]"])
    tokenizer.add_tokens(["<think>"])
    tokenizer.enable_truncation(4)
    fields: dict[str, Any] = json.loads(tokenizer.to_str())
    return json.dumps(fields | changes).encode()


def decoded(ids: list[int]) -> str:
    return b"".join(map(LOADED.token_bytes, ids)).decode()


LOADED = load_tokenizer({"tokenizer.json": tokenizer_json()}, 300)


def test_the_library_itself_would_take_typed_names_for_control_tokens() -> None:
    ids = Tokenizer.from_buffer(tokenizer_json()).encode("[EOS]").ids
    assert ids == [LOADED.token_id("[EOS]")]


@given(st.lists(st.one_of(st.text(), st.sampled_from(["<|im_end|>", "[EOS]", "<think>", "hello"]))).map("".join))
def test_text_survives_encoding_and_holds_no_control_token(text: str) -> None:
    ids = LOADED.encode_text(text)
    assert decoded(ids) == text
    assert not any(map(LOADED.is_special, ids))


def test_merges_are_applied_and_bytes_restored() -> None:
    assert [LOADED.token_bytes(number) for number in LOADED.encode_text("hello")] == [b"hello"]
    (word,) = LOADED.encode_text(" hello")
    assert LOADED.token_bytes(word) == b" hello"


def test_added_tokens_are_control_tokens_and_the_rest_is_reserved() -> None:
    for name in ("<|im_end|>", "[EOS]", "<think>"):
        assert LOADED.is_special(LOADED.token_id(name))
        assert LOADED.token_bytes(LOADED.token_id(name)) == name.encode()
    assert LOADED.stop_ids == {LOADED.token_id("<|im_end|>"), LOADED.token_id("[EOS]")}
    assert LOADED.token_bytes(299) == b"<|reserved_token_299|>"


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"{", "is not a BPE tokenizer"),
        (b"[]", "is not a BPE tokenizer"),
        (tokenizer_json(model={"type": "Unigram", "vocab": [["a", 0.0]]}), "is not a BPE tokenizer"),
        (tokenizer_json(model={"type": "WordPiece", "vocab": {}, "merges": []}), "a WordPiece model"),
        (tokenizer_json(model={"type": "BPE", "vocab": {"a": 0}, "merges": []}), "255 of the 256 bytes have no token"),
        (tokenizer_json(model={"type": "BPE", "vocab": {"a": 400}, "merges": []}), "400 is outside the vocabulary"),
        (tokenizer_json(model={"type": "BPE", "vocab": {"汉": 0}, "merges": []}), "'汉' is no byte-level token"),
        (tokenizer_json(pre_tokenizer={"type": "Unheard"}), r"^tokenizer\.json: "),
        (tokenizer_json(added_tokens=[{"id": 300, "content": "[EOS]"}]), "has id 300, outside the 300 tokens"),
        (tokenizer_json(added_tokens=[{"id": 1, "content": "[B]"}]), "has id 1, which an ordinary token has"),
    ],
)
def test_a_bad_file_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(TokenizerError, match=complaint):
        load_tokenizer({"tokenizer.json": data}, 300)
