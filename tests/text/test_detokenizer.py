from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.text.tokenizer import Detokenizer
from tests.text.fixtures import VOCAB_SIZE, tokenizer

ids = st.lists(st.one_of(st.integers(0x80, 0xFF), st.integers(0, VOCAB_SIZE - 1)))


@given(ids)
def test_streamed_text_equals_all_tokens_decoded_at_once(sequence: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer())
    streamed = "".join(map(detokenizer.add, sequence)) + detokenizer.finish()
    assert streamed == b"".join(map(tokenizer().token_bytes, sequence)).decode(errors="replace")


@given(st.text())
def test_text_is_streamed_in_whole_characters(text: str) -> None:
    detokenizer = Detokenizer(tokenizer())
    pieces = [detokenizer.add(number) for number in text.encode()]
    assert [piece for piece in pieces if piece] == list(text)
    assert detokenizer.finish() == ""


def test_an_unfinished_character_at_the_end_becomes_one_replacement_character() -> None:
    detokenizer = Detokenizer(tokenizer())
    assert [detokenizer.add(number) for number in "é€".encode()[:4]] == ["", "é", "", ""]
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""
    assert detokenizer.add(ord("a")) == "a"


def test_a_control_token_decodes_as_its_name_and_ends_an_unfinished_character() -> None:
    detokenizer = Detokenizer(tokenizer())
    assert detokenizer.add(0xE2) == ""
    assert detokenizer.add(tokenizer().token_id("<think>")) == "\ufffd<think>"
