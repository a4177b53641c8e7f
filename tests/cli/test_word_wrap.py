"""Tests of WordWrap: no line is wider than the width unless one of its words is, and only spaces are lost."""

from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len

from mlx_k2.cli.word_wrap import WordWrap

PIECES = st.lists(
    st.sampled_from(["a", "word", "lengthy", "a-very-long-word", " ", "  ", "\n", "公園", "한국", "é"]), max_size=30
)


def wrapped_lines(pieces: list[str], width: int) -> list[str]:
    wrap = WordWrap()
    return ("".join(wrap.add(piece, width) for piece in pieces) + wrap.rest(width)).split("\n")


@given(pieces=PIECES, width=st.integers(8, 20))
@example(pieces=["word", " word"], width=8)
@example(pieces=["  ", "lengthy"], width=8)
def test_lines_fit_and_have_all_words_in_order_for_any_pieces_of_the_text(pieces: list[str], width: int) -> None:
    lines = wrapped_lines(pieces, width)
    words = "".join(pieces).split()
    assert "".join(lines).replace(" ", "") == "".join(words)
    assert lines == wrapped_lines(["".join(pieces)], width)
    max_word_width = max(map(cell_len, words), default=0)
    assert all(cell_len(line) <= max(width, max_word_width) for line in lines)


def test_a_word_that_does_not_fit_into_the_line_begins_the_next_one() -> None:
    assert wrapped_lines(["The quick  br", "own fox"], 10) == ["The quick", "brown fox"]
    assert wrapped_lines(["  indented\n\nnext"], 20) == ["  indented", "", "next"]
    assert wrapped_lines(["我们今天去公园"], 8) == ["我们今天", "去公园"]


def test_the_last_word_is_returned_only_when_it_is_complete() -> None:
    wrap = WordWrap()
    assert wrap.add("one tw", 80) == "one"
    assert wrap.add("o ", 80) == " two"
    assert wrap.rest(80) == ""
