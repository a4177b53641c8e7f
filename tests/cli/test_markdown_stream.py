"""Tests of the streamed Markdown display against rich's Markdown of the whole answer, in a real terminal."""

import cProfile
import io
import itertools
import os
import pty
import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlx_k2.cli.repl.chat_markdown import ChatMarkdown, chat_parser
from mlx_k2.cli.repl.markdown_stream import MarkdownDisplay, MarkdownStream
from tests.cli.tmux import Terminal, needs_tmux, terminal
from tests.examples import scaled

WIDTH, HEIGHT = 60, 12
DEADLINE_S = 60.0

marker_numbers = itertools.count()
"""Numbers for the marker lines that ``screen_texts`` writes to the pane, which all tests share."""

PYTHON = '''def first(names):
    """Return the first name.

    def is no keyword here, and 1 is no number.
    """
    return names[0]  # "not a string"


TEXT = f"""{first}
for x in y"""
'''
C_CODE = "/* A comment,\n   int in it */\nint x; // one\n#define Y 2\n"
JAVASCRIPT = "/**\n * if (x) return 'y'\n */\nconst x = `a\nif ${b}\n`;\n"

DOCUMENT_LINES = (
    "words **bold** `code`", "word " * 30, "- item", "  more of it", "  - nested", "1. one", "2. two", "10. ten", "1)",
    "- ```js", "  ```", "1. ```", "   ```", "> quote", "> - item", "> ```", "```", "```python", "~~~", "````",
    "def f():", "    '''doc", "    indented", "\tcode", "/* c", "*/", "# heading", "#", "##", "===", "---", "***", "-",
    "| a | b |", "|---|---|", "| 1 | 2 |", "<div>", "</div>", "<!-- c", "-->", "<b>x</b>", "a <kbd>k</kbd> b",
    "[other]: /url", "'title", "[defined] and *not emphasis", "![image](x)", "two spaces  ", "\\", "&amp; &#35;",
    "", "", "", "  ", "\t", "so \\(a_1 * b_2\\) and $$x_{ij}$$", "\\[", "\\frac{a}{b} \\, c_1", "\\]",
    "2\\. no \\*list\\*",
)  # fmt: skip

DOCUMENTS = st.builds(
    lambda lines, end: "[defined]: /url\n" + "\n".join(lines) + end,
    st.lists(st.sampled_from(DOCUMENT_LINES), max_size=40),
    st.sampled_from(["", "\n"]),
)


def console(file: TextIO) -> Console:
    return Console(
        file=file, width=WIDTH, height=HEIGHT, force_terminal=True, color_system="truecolor",
        highlight=False, markup=False, emoji=False,
    )  # fmt: skip


def streamed_output(document: str, piece_lengths: list[int]) -> str:
    """Return the output for ``document`` in pieces of these lengths, which repeat, with a refresh after each."""
    output = io.StringIO()
    display = MarkdownDisplay(console(output))
    start = 0
    for num_chars in itertools.cycle(piece_lengths):
        if start >= len(document):
            break
        display.add(document[start : start + num_chars])
        display.refresh()
        start += num_chars
    display.close()
    return output.getvalue()


def complete_output(document: str) -> str:
    """Return the output of rich's Markdown of the complete ``document``."""
    output = io.StringIO()
    console(output).print(ChatMarkdown(chat_parser().parse(document)))
    return output.getvalue()


@contextmanager
def pseudo_terminal() -> Iterator[tuple[int, TextIO]]:
    """Yield the side of a pseudo-terminal from which its output is read, and the file that a program writes."""
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as output:
        yield reader, output
    os.close(reader)


def read_until(reader: int, text: str) -> str:
    """Read from the pseudo-terminal until ``text`` is in its output. Return all output that was read."""
    output = b""
    deadline = time.monotonic() + DEADLINE_S
    while text.encode() not in output:
        assert select.select([reader], [], [], deadline - time.monotonic())[0], f"{text} is not in {output!r}"
        output += os.read(reader, 65536)
    return output.decode(errors="replace")


@pytest.fixture(scope="module")
def pane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """Yield a terminal whose program writes nothing, so that it shows only what a test writes to its device."""
    folder = tmp_path_factory.mktemp("markdown")
    with terminal(folder, ["sleep", "600"], {"PATH": os.environ["PATH"]}, WIDTH, HEIGHT) as pane:
        yield pane


def screen_texts(pane: Terminal, *outputs: str, with_colours: bool = False) -> list[str]:
    """Write the outputs to the terminal, one after the other. Return the text that the terminal shows for each."""
    number = next(marker_numbers)
    with pane.tty.open("w") as tty:
        tty.write("".join(f"begin {number}.\n{output}\nend {number}.\n" for output in outputs))
    pane.wait_for(f"end {number}.", times=len(outputs))
    parts = pane.text(with_colours=with_colours).split(f"begin {number}.\n")[1:]
    return [part[: part.index(f"end {number}.")].rstrip() for part in parts]


@needs_tmux
def test_a_terminal_that_became_narrower_shows_an_unfinished_answer_once(tmp_path: Path) -> None:
    numbers = [str(number) for number in range(100, 150)]
    with (
        terminal(tmp_path, ["sleep", "600"], {"PATH": os.environ["PATH"]}, WIDTH, HEIGHT) as pane,
        pane.tty.open("w") as tty,
    ):
        tty.write("\n" * HEIGHT)  # the answer begins in the last line
        terminal_console = console(tty)
        display = MarkdownDisplay(terminal_console)
        display.add(" ".join(numbers[:-1]))
        display.refresh()
        pane.wait_for(numbers[-2])
        terminal_console.width = WIDTH // 2
        pane.resize(terminal_console.width, HEIGHT)
        display.add(f" {numbers[-1]}")
        display.refresh()
        assert pane.wait_for(numbers[-1]).split() == numbers
        terminal_console.width = WIDTH // 3
        pane.resize(terminal_console.width, HEIGHT + 8)
        display.close()
        tty.write("end")
        tty.flush()
        assert pane.wait_for("end").split() == [*numbers, "end"]


@needs_tmux
@settings(max_examples=scaled(40))
@given(DOCUMENTS, st.lists(st.sampled_from([1, 2, 5, 20, 100]), min_size=1, max_size=5))
@example("````\n```\nnested\n```\n\nstill code\n````\ntext\n", [1])
@example("- a\n\n  ```\n  code\n\n  # code\n  ```\n\n  more\n- b\n\ntext", [3])
@example("text\n#\ntext\n#no heading", [1])
@example("[other]: /url\n'first line\nsecond line'\n\ntext", [1])
@example("".join(f"{number}. item\n" for number in range(1, 60)), [7])
@example("1. code:\n   ```\n" + "   line\n" * 60 + "   ```\n\nend", [7])
@example("| a | b |\n|---|---|\n" + "| cell | wide |\n" * 60 + "| a much wider cell | c |\n\nend", [7])
@example("```\n\n\ncode\n\n  \n\nmore  \n\n\n```\nend", [1])
def test_a_streamed_answer_ends_as_rich_prints_it(pane: Terminal, document: str, piece_lengths: list[int]) -> None:
    streamed, complete = screen_texts(pane, streamed_output(document, piece_lengths), complete_output(document))
    assert streamed == complete


@needs_tmux
@pytest.mark.parametrize(
    ("language", "code"), [("python", PYTHON), ("c", C_CODE), ("js", JAVASCRIPT), ("nothing", C_CODE)]
)
def test_code_that_is_printed_by_lines_has_the_colours_of_the_block(pane: Terminal, language: str, code: str) -> None:
    document = f"```{language}\n{code}```\n"
    streamed, complete = screen_texts(
        pane, streamed_output(document, [3]), complete_output(document), with_colours=True
    )
    assert streamed == complete


def max_refresh_calls(display: MarkdownDisplay, line: str) -> int:
    """Add ``line`` and refresh 10 times. Return the largest number of function calls of one refresh."""
    num_calls = []
    for _ in range(10):
        display.add(line)
        profile = cProfile.Profile()
        profile.runcall(display.refresh)
        num_calls.append(sum(entry.callcount for entry in profile.getstats()))
    return max(num_calls)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "line"),
    [
        ("```python\n", "    x = 1  # comment\n"),
        ("", "- an **item**\n"),
        ("", "1. an **item**\n"),
        ("1. code:\n   ```python\n", "   x = 1  # comment\n"),
        ("| a | b |\n|---|---|\n", "| 1 | `2` |\n"),
        ("> quote\n", "> and `more`\n"),
        ("> - ", "item\n> - "),
        ("", "a **paragraph** "),
        ("<div>\n", "text\n"),
    ],
)
def test_the_function_calls_of_a_refresh_do_not_grow_with_the_block(start: str, line: str) -> None:
    display = MarkdownDisplay(console(io.StringIO()))
    display.add(start)
    display.refresh()
    display.add(line * 50)
    calls_after_50_lines = max_refresh_calls(display, line)
    display.add(line * 300)
    display.refresh()
    assert max_refresh_calls(display, line) <= 1.1 * calls_after_50_lines
    display.close()


def plain_lines(document: str) -> list[str]:
    """Return the lines that show the complete ``document``, without colours."""
    output = io.StringIO()
    Console(file=output, width=WIDTH, color_system=None).print(ChatMarkdown(chat_parser().parse(document)))
    return [line.rstrip() for line in output.getvalue().splitlines()]


@pytest.mark.parametrize("level", range(1, 7))
def test_a_heading_of_any_level_is_at_the_left(level: int) -> None:
    assert plain_lines(f"{'#' * level} Title\n\ntext")[-3] == "Title"


def test_numbers_of_a_list_have_dots_and_the_next_lines_of_an_item_are_indented_as_its_text() -> None:
    assert plain_lines("9. nine\n10. ten " + "x " * 30)[-3:] == [
        "  9. nine",
        " 10. ten " + "x " * 25 + "x",
        "     x x x x",
    ]
    assert plain_lines("- a\n- b")[-2:] == [" • a", " • b"]


@pytest.mark.parametrize(
    "formula",
    [
        r"\(a_1*b_2*c\)",
        r"\[ \frac{a}{b} \, c_1 * d_2 * e \]",
        "$$x_{ij} * y_k * z$$",
        r"\{x \mid x > 0\}",
        r"a \\ b",
        r"\sqrt{2}",
    ],
)
def test_a_formula_is_shown_as_it_was_written(formula: str) -> None:
    assert plain_lines(f"So {formula} holds, *really*.") == [f"So {formula} holds, really."]


def test_escapes_of_markdown_are_not_formulas() -> None:
    assert plain_lines(r"\*stars\*, 1\. and \`ticks\`, \$5") == ["*stars*, 1. and `ticks`, $5"]
    assert plain_lines(r"an open \( is *text*") == [r"an open \( is text"]


def test_a_closing_kbd_tag_without_an_opening_tag_is_no_error() -> None:
    assert "press x" in streamed_output("press </kbd>x\n\n<kbd>y\n\nz", [1])


def test_a_link_is_resolved_by_a_definition_in_an_earlier_block() -> None:
    assert "https://example.org" in streamed_output("[a]: https://example.org\n\ntext\n\n[a]", [1])


def test_text_is_shown_before_the_answer_is_closed() -> None:
    with pseudo_terminal() as (reader, output):
        display = MarkdownStream(console(output))
        display.add("first words")
        assert "first words" in read_until(reader, "first words")
        display.add(" and more")
        assert "and more" in read_until(reader, "and more")
        display.close()


def test_add_does_not_wait_for_a_terminal_that_is_not_read_and_no_text_is_lost() -> None:
    with pseudo_terminal() as (reader, output):
        display = MarkdownStream(console(output))
        for number in range(5000):  # more than a pseudo-terminal holds
            display.add(f"word{number}\n\n")
        closing = threading.Thread(target=display.close)
        closing.start()
        text = read_until(reader, "word4999")
        closing.join(DEADLINE_S)
        assert not closing.is_alive()
    assert all(f"word{number}" in text for number in range(5000))
