"""Tests of the lines of streamed text: no line is wider than the width unless one word is, and only spaces are lost."""

from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len

from mlx_k2.cli.word_wrap import WordWrap

TEXT = st.lists(
    st.sampled_from(["a", "word", "lengthy", "a-very-long-word", " ", "  ", "\n", "公園", "한국", "é"]), max_size=30
)


def shown(pieces: list[str], width: int) -> list[str]:
    wrap = WordWrap()
    return ("".join(wrap.add(piece, width) for piece in pieces) + wrap.rest(width)).split("\n")


@given(pieces=TEXT, width=st.integers(8, 20))
@example(pieces=["word", " word"], width=8)
def test_lines_fit_and_keep_every_word_in_its_order(pieces: list[str], width: int) -> None:
    lines = shown(pieces, width)
    words = "".join(pieces).split()
    assert "".join(lines).replace(" ", "") == "".join(words)
    whole = shown(["".join(pieces)], width)
    assert lines == whole, "lines do not depend on how the text is cut into pieces"
    longest = max((cell_len(word) for word in words), default=0)
    assert all(cell_len(line) <= max(width, longest) for line in lines)


def test_a_word_begins_a_line_if_it_does_not_fit_into_the_present_one() -> None:
    assert shown(["The quick  br", "own fox"], 10) == ["The quick", "brown fox"]
    assert shown(["  indented\n\nnext"], 20) == ["  indented", "", "next"]
    assert shown(["我们今天去公园"], 8) == ["我们今天", "去公园"]


def test_the_last_word_is_held_back_until_it_is_complete() -> None:
    wrap = WordWrap()
    assert wrap.add("one tw", 80) == "one"
    assert wrap.add("o ", 80) == " two"
    assert wrap.rest(80) == ""
