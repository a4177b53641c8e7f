"""Tests of the chat on real stages: answers and tool calls of the built-in model, and stages that fail."""

import json
import os
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.command import MLX_K2, CommandLine, stage_processes
from tests.cli.tmux import Terminal, needs_tmux, terminal
from tests.local_cluster import still_running_after

TOOLS = """
def get_weather(city: str) -> dict:
    \"\"\"Get the weather in a city.\"\"\"
    return {"city": city, "sky": "sunny", "temperature": 21}
"""
WEATHER_QUESTION = "What is the weather in Paris?"
WEATHER_ANSWER = "In Paris it is sunny and 21 degrees."
FIRST_ANSWER = "mlx-k2 runs Kimi K2 models over several Macs"
"""Beginning of the built-in model's answer to "What is mlx-k2?"."""
ENDLESS_MODEL_TEXT = "reserved_token"
"""Text that the endless model, which has random weights, generates within a few tokens."""


@contextmanager
def chat(command_line: CommandLine, folder: Path, *options: str) -> Iterator[Terminal]:
    """Run `mlx-k2 chat` with two stages in a terminal."""
    command = [MLX_K2, "chat", "--stages", "2", *options]
    with terminal(folder, command, command_line.environment(TERM="xterm-256color")) as pane:
        pane.wait_for("/help lists the commands")
        yield pane


def write_tools(folder: Path) -> str:
    (folder / "weather.py").write_text(TOOLS)
    return str(folder / "weather.py")


def write_waiting_hosts(folder: Path) -> tuple[Path, Path]:
    """Return a hostfile of two stages on this machine, and the path of a file: until it exists, no stage starts."""
    may_start, python, hostfile = folder / "may start", folder / "python", folder / "hosts.json"
    python.write_text(f'#!/bin/sh\nwhile [ ! -e "{may_start}" ]; do sleep 0.05; done\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    host = {"ssh": "127.0.0.1", "ips": ["127.0.0.1"], "python": str(python)}
    hostfile.write_text(json.dumps([host, host]))
    return hostfile, may_start


@contextmanager
def starting_chat(command_line: CommandLine, folder: Path) -> Iterator[tuple[Terminal, Path]]:
    """Run `mlx-k2 chat` in a terminal. Yield it, and the path of a file: until it exists, no stage starts."""
    hostfile, may_start = write_waiting_hosts(folder)
    command = [MLX_K2, "chat", "--hostfile", str(hostfile)]
    with terminal(folder, command, command_line.environment(TERM="xterm-256color")) as pane:
        pane.wait_for("starting 2 stages")
        yield pane, may_start


def has_echo(tty: Path) -> bool:
    """Return whether a terminal echoes keys."""
    descriptor = os.open(tty, os.O_RDWR | os.O_NOCTTY)
    local_flags: int = termios.tcgetattr(descriptor)[3]
    os.close(descriptor)
    return bool(local_flags & termios.ECHO)


@needs_tmux
def test_a_message_typed_while_the_stages_start_is_sent_when_the_chat_begins(
    command_line: CommandLine, tmp_path: Path
) -> None:
    with starting_chat(command_line, tmp_path) as (pane, may_start):
        pane.send_message("What is 3 plus 4?")
        may_start.touch()
        text = pane.wait_for("3 + 4 = 7")
        assert text.count("What is 3 plus 4?") == text.count("> What is 3 plus 4?") == 1  # not echoed before
        pane.type("C-d")
        pane.wait_for("exit code 0")


@needs_tmux
def test_ctrl_c_while_the_stages_start_ends_the_program_and_restores_the_terminal(
    command_line: CommandLine, tmp_path: Path
) -> None:
    with starting_chat(command_line, tmp_path) as (pane, _):
        assert not has_echo(pane.tty)
        pane.type("C-c")
        pane.wait_for("exit code 130")
        assert has_echo(pane.tty)


@pytest.mark.slow
@needs_tmux
def test_a_chat_on_stages_answers_stops_an_answer_and_leaves_no_process(
    command_line: CommandLine, endless_model: Path, tmp_path: Path
) -> None:
    with chat(command_line, tmp_path, "--model", str(endless_model), "--seed", "1") as pane:
        pane.wait_for("2 stages")
        pane.send_message("Hello")
        pane.wait_for(ENDLESS_MODEL_TEXT)
        pane.type("C-c")
        pane.wait_for("the answer was")  # stopped, or cut off if it has ended before
        pane.send_message("/stats")
        pane.wait_for("computing")
        processes = pane.processes()
        pane.type("C-d")
        pane.wait_for("exit code 0")
        assert still_running_after(processes, 60) == []


@pytest.mark.slow
@needs_tmux
def test_the_built_in_model_calls_a_tool_after_approval_and_answers_from_its_result(
    command_line: CommandLine, tmp_path: Path
) -> None:
    with chat(command_line, tmp_path, "--tools", write_tools(tmp_path)) as pane:
        pane.send_message(WEATHER_QUESTION)
        pane.wait_for("the model wants to call get_weather")
        assert '  city: "Paris"' in pane.wait_for("run it?")
        pane.send_message("y")
        pane.wait_for(WEATHER_ANSWER)
        pane.send_message("What is a token?")
        pane.wait_for("A token is a piece of text")
        pane.type("C-d")
        pane.wait_for("exit code 0")


@pytest.mark.slow
def test_generate_calls_tools_and_prints_only_the_answer_to_stdout(command_line: CommandLine, tmp_path: Path) -> None:
    result = command_line.run("generate", "--tools", write_tools(tmp_path), "--yes", WEATHER_QUESTION)
    assert result.returncode == 0, result.stderr
    assert result.stdout == WEATHER_ANSWER + "\n"
    assert 'get_weather({"city": "Paris"})' in result.stderr


@pytest.mark.slow
@needs_tmux
def test_stages_that_end_while_the_chat_is_idle_are_restarted(command_line: CommandLine, tmp_path: Path) -> None:
    with chat(command_line, tmp_path) as pane:
        pane.send_message("What is mlx-k2?")
        pane.wait_for(FIRST_ANSWER)
        stage_processes(pane.processes())[0].kill()
        pane.send_message("What is a token?")
        pane.wait_for("A token is a piece of text")
        assert "all stages start again" in pane.text()
        processes = pane.processes()
        pane.type("C-d")
        pane.wait_for("exit code 0")
        assert still_running_after(processes, 60) == []


@pytest.mark.slow
@needs_tmux
def test_a_fault_that_ends_the_chat_saves_the_conversation(command_line: CommandLine, tmp_path: Path) -> None:
    with chat(command_line, tmp_path, "--restarts", "off") as pane:
        pane.send_message("What is mlx-k2?")
        pane.wait_for(FIRST_ANSWER)
        stage_processes(pane.processes())[0].kill()
        pane.send_message("What is a token?")
        pane.wait_for("exit code 1")
        text = "".join(pane.text().split("\n"))  # the terminal wraps long lines
        assert "ended with signal 9" in text
    (saved,) = command_line.home.rglob("chat-*.json")
    assert saved.name in text
    contents = [message["content"] for message in json.loads(saved.read_text())["messages"]]
    assert contents[0] == "What is mlx-k2?" and FIRST_ANSWER in contents[1]
    saved = saved.rename(tmp_path / "chat.json")
    with chat(command_line, tmp_path) as pane:
        pane.send_message(f"/load {saved}")
        pane.wait_for(f"{len(contents)} messages from")


@pytest.mark.slow
@needs_tmux
def test_ctrl_c_ends_an_answer_at_once_while_a_suspended_stage_blocks_it(
    command_line: CommandLine, endless_model: Path, tmp_path: Path
) -> None:
    with chat(command_line, tmp_path, "--model", str(endless_model), "--stall-timeout", "60") as pane:
        processes = pane.processes()
        pane.send_message("Hello")
        pane.wait_for(ENDLESS_MODEL_TEXT)
        stage_processes(pane.processes())[1].suspend()
        pane.type("C-c")
        pane.wait_for("the answer was stopped")
        pane.type("C-d")
        pane.wait_for("exit code 0")
        assert still_running_after(processes, 60) == []


@pytest.mark.slow
@needs_tmux
def test_ctrl_c_during_a_restart_ends_it_within_2_s_and_keeps_the_conversation(
    command_line: CommandLine, endless_model: Path, tmp_path: Path
) -> None:
    hostfile, may_start = write_waiting_hosts(tmp_path)
    may_start.touch()
    options = ["--model", str(endless_model), "--seed", "1", "--hostfile", str(hostfile)]
    with terminal(tmp_path, [MLX_K2, "chat", *options], command_line.environment(TERM="xterm-256color")) as pane:
        pane.wait_for("/help lists the commands")
        pane.send_message("Hello")
        pane.wait_for(ENDLESS_MODEL_TEXT)
        may_start.unlink()
        stage_processes(pane.processes())[1].kill()
        pane.wait_for("restart 1 of at most 3: starting 2 stages")
        interrupted_at = time.monotonic()
        pane.type("C-c")
        pane.wait_for("the answer was stopped")
        assert time.monotonic() - interrupted_at < 2.0
        pane.send_message(f"/save {tmp_path / 'chat.json'}")
        pane.wait_for("the conversation is in")
        messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
        assert messages[0] == {"role": "user", "content": "Hello"}
        assert ENDLESS_MODEL_TEXT in json.dumps(messages[1])
        pane.send_message("Again")
        pane.wait_for("restart 1 of at most 3: starting 2 stages")
        may_start.touch()
        pane.wait_for("> Again")
        pane.type("C-c")
        pane.wait_for("the answer was stopped", times=2)
        pane.type("C-d")
        pane.wait_for("exit code 0")


@pytest.mark.slow
def test_lines_on_standard_input_are_messages_and_stdout_has_only_answers(command_line: CommandLine) -> None:
    result = command_line.run("chat", "--max-tokens", "12", "--seed", "5", stdin="Hello\n/nonsense\n/stats\n/help\n")
    assert result.returncode == 1, result.stderr  # a line has failed
    assert "error: there is no command /nonsense" in result.stderr
    assert "replies 1 ·" in result.stderr
    assert "show this list" in result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("error: ")]  # errors are not wrapped
    assert max(map(len, lines)) <= 80, "a line is wider than a terminal of 80 columns"
    assert "\x1b" not in result.stdout + result.stderr
    assert "replies" not in result.stdout


def test_a_line_that_is_not_utf_8_and_a_mistyped_command_are_refused_on_standard_input(
    command_line: CommandLine,
) -> None:
    result = subprocess.run(
        [MLX_K2, "chat", "--stages", "1"],
        input=b"hi\xff\n/hlep\n",
        capture_output=True,
        timeout=60,
        env=command_line.environment(),
    )
    errors = result.stderr.decode()
    assert (result.returncode, result.stdout) == (1, b""), errors  # nothing was sent to the model
    assert "error: this line is not UTF-8 text, and is not sent: hi\N{REPLACEMENT CHARACTER}" in errors
    assert "error: there is no command /hlep: did you mean /help? /help lists them" in errors
    assert "Ctrl-D" not in errors
