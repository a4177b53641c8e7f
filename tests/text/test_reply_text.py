"""Tests of the text of a reply, which its tokens complete one after another."""

from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.text.reply_parser import ReplyReader
from tests.text.fixtures import VOCAB_SIZE, tokenizer

ids = st.lists(st.one_of(st.integers(0x80, 0xFF), st.integers(0, VOCAB_SIZE - 1)))


def raw_reader() -> ReplyReader:
    return ReplyReader(tokenizer(), (), (), is_raw=True)


@given(ids)
def test_streamed_text_equals_all_tokens_decoded_at_once(sequence: list[int]) -> None:
    reader = raw_reader()
    streamed = "".join(reader.add(number).text for number in sequence) + reader.finish().text
    assert streamed == b"".join(map(tokenizer().token_bytes, sequence)).decode(errors="replace")


@given(st.text())
def test_text_is_streamed_in_whole_characters(text: str) -> None:
    reader = raw_reader()
    pieces = [reader.add(number).text for number in text.encode()]
    assert [piece for piece in pieces if piece] == list(text)
    assert reader.finish().text == ""


def test_an_unfinished_character_at_the_end_becomes_one_replacement_character() -> None:
    reader = raw_reader()
    assert [reader.add(number).text for number in "é€".encode()[:4]] == ["", "é", "", ""]
    assert reader.finish().text == "\ufffd"
    assert reader.finish().text == ""
    assert reader.add(ord("a")).text == "a"


def test_a_control_token_decodes_as_its_name_and_ends_an_unfinished_character() -> None:
    reader = raw_reader()
    assert reader.add(0xE2).text == ""
    assert reader.add(tokenizer().token_id("<think>")).text == "\ufffd<think>"
