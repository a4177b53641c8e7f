"""Tests of the chat in a real terminal, driven by key presses, with scripted replies."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import CommandLine
from tests.cli.tmux import Terminal, needs_tmux, terminal

ROOT = Path(__file__).parent.parent.parent
COLOUR_START = "\x1b[3"
"""First characters of the SGR codes 30 to 38, which set a foreground colour."""


@contextmanager
def scripted_chat(command_line: CommandLine, folder: Path, script: str, **environment: str) -> Iterator[Terminal]:
    """Run tests/cli/scripted_chat.py in a terminal, with a transcript in ``folder``. ``script`` is a key of REPLIES."""
    command = [sys.executable, "-m", "tests.cli.scripted_chat", script, str(folder / "transcript.jsonl")]
    variables = {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **environment}
    with terminal(folder, command, command_line.environment(**variables)) as pane:
        yield pane


def read_transcript(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "transcript.jsonl").read_text().splitlines()]


@pytest.mark.slow
@needs_tmux
def test_the_chat_handles_multiline_input_stop_undo_and_files(command_line: CommandLine, tmp_path: Path) -> None:
    with scripted_chat(command_line, tmp_path, "talk") as pane:
        pane.wait_for("2 stages")
        pane.send_message("hello")
        text = pane.wait_for("Bye.")
        assert "Hello there." in text and "**" not in text and "```" not in text
        coloured_lines = pane.text(with_colours=True).splitlines()
        reasoning = next(line for line in coloured_lines if "Somebody greets." in line)
        assert "\x1b[2" in reasoning or ";2" in reasoning  # faint
        assert "\x1b[1m" in next(line for line in coloured_lines if "there" in line)  # bold

        pane.type("one", "\\", "Enter", "two")
        pane.wait_for(". two")
        pane.type("Enter")
        pane.wait_for("You wrote two lines.")
        pane.send_message("long")
        pane.wait_for("word word")
        pane.type("C-c")
        pane.wait_for("the answer was stopped")
        pane.type("/und")
        pane.wait_for("/undo")
        pane.type("o", "Enter")
        pane.wait_for("removed: long")
        saved = tmp_path / "saved chat.json"
        pane.send_message(f"/save {saved}")
        pane.wait_for("the conversation is in")
        pane.send_message("/reset")
        pane.wait_for("a new conversation")
        pane.send_message(f"/load {tmp_path / 'nothing'}")
        pane.wait_for("cannot be read")
        pane.send_message(f"/load {saved}")
        pane.wait_for("4 messages from")
        pane.send_message("again")
        pane.wait_for("Once more.")
        pane.type("C-d")
        assert "left" in pane.wait_for("exit code 0")
    messages = json.loads(saved.read_text())["messages"]
    assert [message["content"] for message in messages] == [
        "hello",
        "Hello **there**.\n\n```python\nprint(1)\n```\n\nBye.",
        "one\ntwo",
        "You wrote two lines.",
    ]
    lines = read_transcript(tmp_path)
    assert "".join(str(line["reasoning"]) for line in lines if "reasoning" in line) == "Somebody greets.Long."
    assert [line["message"]["role"] for line in lines if "message" in line] == ["user", "assistant"] * 4
    with scripted_chat(command_line, tmp_path, "talk") as pane:
        pane.wait_for("2 stages")
        pane.type("Up")
        pane.wait_for("> again")
        pane.type("C-c", "C-d")
        pane.wait_for("exit code 0")


@needs_tmux
def test_tool_calls_can_be_approved_declined_or_always_allowed(command_line: CommandLine, tmp_path: Path) -> None:
    with scripted_chat(command_line, tmp_path, "tools") as pane:
        pane.wait_for("2 stages")
        pane.send_message("/tools")
        pane.wait_for("add  [asks first]  Add two numbers.")
        pane.send_message("a sum")
        pane.wait_for("run it?")
        lines = pane.text(with_colours=True).splitlines()
        call = next(index for index, line in enumerate(lines) if "the model wants to call add" in line)
        assert "\x1b[2" not in lines[call] and lines[call + 1] == "  a: 40"  # not faint
        pane.send_message("y")
        pane.wait_for('add({"a": 40}) → 42')
        pane.wait_for("It is 42.")
        pane.send_message("another")
        pane.wait_for("run it?", times=2)
        pane.send_message("n")
        pane.wait_for("[declined]")
        pane.wait_for("No sum.")
        pane.send_message("and two more")
        pane.wait_for("run it?", times=3)
        pane.send_message("a")
        text = pane.wait_for("Allowed.")
        assert text.count("run it?") == 3
        assert text.count("→ 42") == 3
        pane.send_message("/quit")
        pane.wait_for("exit code 0")


@pytest.mark.slow
@needs_tmux
@pytest.mark.parametrize("terminal_type", ["xterm-256color", "dumb"])
def test_an_approval_that_was_typed_before_its_question_is_discarded(
    command_line: CommandLine, tmp_path: Path, terminal_type: str
) -> None:
    with scripted_chat(command_line, tmp_path, "late call", TERM=terminal_type) as pane:
        pane.wait_for(">")
        pane.send_message("a sum")
        pane.wait_for("word word")
        pane.send_message("yes")
        pane.send_message("always")
        pane.wait_for("run it?")
        pane.send_message("n")
        text = pane.wait_for("No sum.")
        assert text.count("run it?") == 1 and "[declined]" in text and "→ 42" not in text


@pytest.mark.slow
@needs_tmux
def test_a_resized_terminal_rewraps_lines_and_the_answer_continues(command_line: CommandLine, tmp_path: Path) -> None:
    with scripted_chat(command_line, tmp_path, "talk") as pane:
        pane.wait_for("2 stages")
        pane.send_message("one")
        pane.wait_for("Bye.")
        pane.send_message("two")
        pane.wait_for("You wrote two lines.")
        pane.send_message("three")
        pane.wait_for("word word")
        pane.resize(50, 20)
        pane.wait_for("> three")
        pane.type("C-c")
        pane.wait_for("the answer was stopped")
        pane.send_message("four")
        text = pane.wait_for("Once more.")
        assert max(len(line.rstrip()) for line in text.splitlines()) <= 50
        pane.type("C-d")
        pane.wait_for("exit code 0")


@pytest.mark.slow
@needs_tmux
def test_no_color_and_a_dumb_terminal_give_plain_output(command_line: CommandLine, tmp_path: Path) -> None:
    for name, environment in (("none", {"NO_COLOR": "1"}), ("dumb", {"TERM": "dumb"})):
        (folder := tmp_path / name).mkdir()
        with scripted_chat(command_line, folder, "talk", **environment) as pane:
            pane.wait_for(">")
            pane.send_message("hello")
            pane.wait_for("Bye.")
            assert "Hello **there**." in pane.text()
            assert COLOUR_START not in pane.text(with_colours=True)
            pane.type("C-d")
            pane.wait_for("exit code 0")


@pytest.mark.slow
@needs_tmux
def test_a_third_ctrl_c_interrupts_an_answer_that_does_not_stop(command_line: CommandLine, tmp_path: Path) -> None:
    with scripted_chat(command_line, tmp_path, "stuck") as pane:
        pane.wait_for("2 stages")
        pane.send_message("hello")
        pane.wait_for("Thi")  # the script's answer stops here
        for _ in range(3):
            pane.type("C-c")
            threading.Event().wait(0.5)  # as by hand: a busy machine merges signals that arrive together
        pane.type("C-d")
        pane.wait_for("exit code 0")


@needs_tmux
def test_a_low_terminal_shows_the_prompt_and_the_typed_text(command_line: CommandLine, tmp_path: Path) -> None:
    with scripted_chat(command_line, tmp_path, "talk") as pane:
        pane.wait_for("2 stages")
        for columns, rows, key, text in ((80, 8, "a", "> a"), (30, 8, "b", "> ab"), (40, 3, "c", "> abc")):
            pane.resize(columns, rows)
            pane.type(key)
            pane.wait_for(text)
        pane.type("C-u", "C-d")  # delete the line, and leave
        pane.wait_for("exit code 0")
