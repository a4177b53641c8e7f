"""Tests of a reply's text as it is streamed: token by token, in complete characters."""

from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.text.reply_parser import ReplyReader
from tests.text.fixtures import VOCAB_SIZE, tokenizer

id_lists = st.lists(st.one_of(st.integers(0x80, 0xFF), st.integers(0, VOCAB_SIZE - 1)))
"""Lists with many ids of single bytes that are no characters. The tests' tokenizer has bytes as their own ids."""


def raw_reader() -> ReplyReader:
    return ReplyReader(tokenizer(), (), (), is_raw=True)


@given(id_lists)
def test_streamed_text_equals_all_tokens_decoded_at_once(ids: list[int]) -> None:
    reader = raw_reader()
    streamed_text = "".join(reader.add(token_id).text for token_id in ids) + reader.finish().text
    assert streamed_text == b"".join(map(tokenizer().token_bytes, ids)).decode(errors="replace")


@given(st.text())
def test_text_is_streamed_in_whole_characters(text: str) -> None:
    reader = raw_reader()
    texts = [reader.add(byte).text for byte in text.encode()]
    assert [text for text in texts if text] == list(text)
    assert reader.finish().text == ""


def test_an_unfinished_character_at_the_end_becomes_one_replacement_character() -> None:
    reader = raw_reader()
    assert [reader.add(byte).text for byte in "é€".encode()[:4]] == ["", "é", "", ""]
    assert reader.finish().text == "\ufffd"
    assert reader.finish().text == ""
    assert reader.add(ord("a")).text == "a"


def test_a_control_token_decodes_as_its_name_and_ends_an_unfinished_character() -> None:
    reader = raw_reader()
    assert reader.add(0xE2).text == ""
    assert reader.add(tokenizer().token_id("<think>")).text == "\ufffd<think>"
