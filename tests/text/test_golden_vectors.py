"""Tests of Kimi K2's published token ids, on a vocabulary of K2's size with the tested tokens at their ids."""

import functools
import itertools

import pytest

from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer
from tests.text.fixtures import SINGLE_BYTES, builtin_template, ids_of, tiktoken_files
from tests.text.kimi import VOCAB_SIZE

SENTENCE = "I'm| sure| it's| fine|,| but| I| can't| say| I'd| trust| that| it's| what| we'd| ship|."
SENTENCE_IDS = [17172, 3287, 4643, 8201, 11, 996, 374, 8971, 3637, 20020, 8173, 473, 4643, 1573, 56229, 13922, 13]
NUMBER_IDS = {"123": 6694, "456": 12972, "789": 16242, "0": 15}
WORD_IDS = {"hello": 22931, "user": 2482, "assistant": 69702}
PUBLISHED_IDS = dict(zip(SENTENCE.split("|"), SENTENCE_IDS, strict=True)) | NUMBER_IDS | WORD_IDS
MARKERS = {163_586: "<|im_end|>", 163_587: "<|im_user|>", 163_588: "<|im_assistant|>", 163_594: "<|im_system|>"}
MARKERS[163_601] = "<|im_middle|>"


NUM_ORDINARY = 163_584


def k2_tokens() -> list[bytes]:
    """Return K2's number of tokens: the published ones at their ids, single bytes and filler tokens at the others."""
    published = {token_id: text.encode() for text, token_id in PUBLISHED_IDS.items()}
    pairs = [bytes(pair) for pair in itertools.product(range(256), range(256))]
    triples = (bytes([first]) + pair for first in (0, 1) for pair in pairs)
    published_tokens = set(published.values())
    other_tokens = (token for token in itertools.chain(SINGLE_BYTES, pairs, triples) if token not in published_tokens)
    return [published.get(token_id) or next(other_tokens) for token_id in range(NUM_ORDINARY)]


@functools.cache
def k2_tokenizer() -> Tokenizer:
    return load_tokenizer(tiktoken_files(k2_tokens(), MARKERS), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (SENTENCE.replace("|", ""), SENTENCE_IDS),
        ("1234567890", [6694, 12972, 16242, 15]),
        ("hello", [22931]),
        ("user", [2482]),
        ("assistant", [69702]),
    ],
)
def test_text_is_encoded_to_the_published_ids(text: str, ids: list[int]) -> None:
    assert k2_tokenizer().encode_text(text) == ids


def test_a_user_turn_is_rendered_to_the_published_ids() -> None:
    ids = ids_of(builtin_template(), k2_tokenizer(), [{"role": "user", "content": "hello"}])
    assert ids[-8:] == [163_587, 2482, 163_601, 22931, 163_586, 163_588, 69702, 163_601]
    assert ids[0] == 163_594


def test_think_tokens_have_their_known_ids_when_the_config_does_not_name_them() -> None:
    assert (k2_tokenizer().token_id("<think>"), k2_tokenizer().token_id("</think>")) == (163_606, 163_607)
    assert k2_tokenizer().token_bytes(163_606) == b"<think>"
    assert k2_tokenizer().is_special(163_607)


def test_think_tokens_named_in_the_config_have_the_configs_ids() -> None:
    control_tokens = {163_606: "<other>", 163_620: "<think>", 163_621: "</think>"}
    tokenizer = load_tokenizer(tiktoken_files(k2_tokens(), control_tokens), VOCAB_SIZE)
    assert (tokenizer.token_id("<think>"), tokenizer.token_id("</think>")) == (163_620, 163_621)
    assert tokenizer.token_id("<other>") == 163_606


def test_a_vocabulary_of_another_size_has_no_think_tokens_unless_named() -> None:
    tokenizer = load_tokenizer(tiktoken_files(k2_tokens()[:-1], MARKERS), VOCAB_SIZE)
    assert "<think>" not in tokenizer.special_ids


def test_special_ids_without_a_name_in_the_config_are_reserved_tokens() -> None:
    for token_id in (163_589, 163_592, 163_600, 163_839):
        assert k2_tokenizer().token_bytes(token_id) == f"<|reserved_token_{token_id}|>".encode()
