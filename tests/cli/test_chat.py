"""Tests of the chat in a real terminal, driven by key presses, with scripted replies."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.command import CommandLine
from tests.cli.tmux import Terminal, needs_tmux, terminal

ROOT = Path(__file__).parent.parent.parent
A_COLOUR = "\x1b[3"
"""First bytes of every SGR code of a foreground colour."""


@contextmanager
def scripted(command_line: CommandLine, folder: Path, script: str, **environment: str) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "tests.cli.scripted_chat", script, str(folder / "transcript.jsonl")]
    full = {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **environment}
    with terminal(folder, command, command_line.environment(**full)) as pane:
        yield pane


def transcript(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "transcript.jsonl").read_text().splitlines()]


@pytest.mark.slow
@needs_tmux
def test_the_terminal_chat_handles_multiline_input_stop_undo_and_files(
    command_line: CommandLine, tmp_path: Path
) -> None:
    with scripted(command_line, tmp_path, "talk") as pane:
        pane.wait_for("2 stages")
        pane.send_message("hello")
        shown = pane.wait_for("Bye.")
        assert "Hello there." in shown and "**" not in shown and "```" not in shown
        coloured = pane.shown(with_colours=True)
        thought = next(line for line in coloured.splitlines() if "Somebody greets." in line)
        assert "\x1b[2" in thought or ";2" in thought
        assert "\x1b[1m" in next(line for line in coloured.splitlines() if "there" in line)

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
        shown = pane.wait_for("exit code 0")
        assert "left" in shown
    messages = json.loads(saved.read_text())["messages"]
    assert [message["content"] for message in messages] == [
        "hello",
        "Hello **there**.\n\n```python\nprint(1)\n```\n\nBye.",
        "one\ntwo",
        "You wrote two lines.",
    ]
    lines = transcript(tmp_path)
    assert "".join(str(line["reasoning"]) for line in lines if "reasoning" in line) == "Somebody greets.Long."
    reported = [line["message"] for line in lines if "message" in line]
    assert [message["role"] for message in reported if isinstance(message, dict)] == ["user", "assistant"] * 4
    with scripted(command_line, tmp_path, "talk") as pane:
        pane.wait_for("2 stages")
        pane.type("Up")
        pane.wait_for("> again")
        pane.type("C-c", "C-d")
        pane.wait_for("exit code 0")


@needs_tmux
def test_tool_calls_can_be_approved_declined_or_always_allowed(command_line: CommandLine, tmp_path: Path) -> None:
    with scripted(command_line, tmp_path, "tools") as pane:
        pane.wait_for("2 stages")
        pane.send_message("/tools")
        pane.wait_for("add  [asks first]  Add two numbers.")
        pane.send_message("a sum")
        pane.wait_for("run it?")
        coloured = pane.shown(with_colours=True).splitlines()
        call = next(number for number, line in enumerate(coloured) if "the model wants to call add" in line)
        assert "\x1b[2" not in coloured[call] and coloured[call + 1] == "  a: 40"  # in normal weight
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
        shown = pane.wait_for("Allowed.")
        assert shown.count("run it?") == 3
        assert shown.count("→ 42") == 3
        pane.send_message("/quit")
        pane.wait_for("exit code 0")


@pytest.mark.slow
@needs_tmux
@pytest.mark.parametrize("kind", ["xterm-256color", "dumb"])
def test_an_answer_that_was_typed_before_its_question_is_discarded(
    command_line: CommandLine, tmp_path: Path, kind: str
) -> None:
    with scripted(command_line, tmp_path, "late call", TERM=kind) as pane:
        pane.wait_for(">")
        pane.send_message("a sum")
        pane.wait_for("word word")
        pane.send_message("yes")
        pane.send_message("always")
        pane.wait_for("run it?")
        pane.send_message("n")
        shown = pane.wait_for("No sum.")
        assert shown.count("run it?") == 1 and "[declined]" in shown and "→ 42" not in shown


@pytest.mark.slow
@needs_tmux
def test_a_resized_terminal_rewraps_lines_and_the_answer_continues(command_line: CommandLine, tmp_path: Path) -> None:
    with scripted(command_line, tmp_path, "talk") as pane:
        pane.wait_for("2 stages")
        for text, reply in (("one", "Bye."), ("two", "You wrote two lines.")):
            pane.send_message(text)
            pane.wait_for(reply)
        pane.send_message("three")
        pane.wait_for("word word")
        pane.resize(50, 20)
        pane.wait_for("> three")
        pane.type("C-c")
        pane.wait_for("the answer was stopped")
        pane.send_message("four")
        shown = pane.wait_for("Once more.")
        assert max(len(line.rstrip()) for line in shown.splitlines()) <= 50
        pane.type("C-d")
        pane.wait_for("exit code 0")


@pytest.mark.slow
@needs_tmux
def test_no_color_and_a_dumb_terminal_give_plain_output(command_line: CommandLine, tmp_path: Path) -> None:
    for name, environment in (("none", {"NO_COLOR": "1"}), ("dumb", {"TERM": "dumb"})):
        (folder := tmp_path / name).mkdir()
        with scripted(command_line, folder, "talk", **environment) as pane:
            pane.wait_for(">")
            pane.send_message("hello")
            pane.wait_for("Bye.")
            assert "Hello **there**." in pane.shown()
            assert A_COLOUR not in pane.shown(with_colours=True)
            pane.type("C-d")
            pane.wait_for("exit code 0")


@pytest.mark.slow
@needs_tmux
def test_a_third_ctrl_c_interrupts_an_answer_that_does_not_stop(command_line: CommandLine, tmp_path: Path) -> None:
    with scripted(command_line, tmp_path, "stuck") as pane:
        pane.wait_for("2 stages")
        pane.send_message("hello")
        pane.wait_for("Thi")
        for _ in range(3):
            pane.type("C-c")
            threading.Event().wait(0.5)  # as by hand: a busy machine merges signals that arrive together
        pane.type("C-d")
        pane.wait_for("exit code 0")
