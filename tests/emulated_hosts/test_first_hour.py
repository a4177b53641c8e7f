"""Tests of the commands in README.md on three hosts, in a terminal, as a new user types them, with mistakes.

The tests run in order, once for each terminal size: all after the test of setup use what it has installed and written.
The names of hosts are replaced by the names of the emulated hosts, and `make demo` by its command: the packages that it
installs are here already.
"""

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.emulated_hosts.hosts import EmulatedHosts, what_is_missing
from tests.emulated_hosts.test_generate import MLX_K2
from tests.pty_command import PtyCommand, on_pty
from tests.stub_wheels import write_stub_wheels
from tests.test_readme import README

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240.0
TERMINAL_SIZES = ((80, 24), (120, 40))
"""Columns and rows of the terminals."""

StartLine = Callable[[str], AbstractContextManager[PtyCommand]]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedHosts]:
    """Yield three hosts without a profile. The home of the first one has a clone of the repository."""
    if missing := what_is_missing():
        pytest.skip(missing)
    with EmulatedHosts(tmp_path_factory.mktemp("hosts"), num_hosts=3) as emulated:
        clone = emulated.homes[0] / "mlx-k2"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True, timeout=60)
        (clone / "prompts.jsonl").write_text('{"prompt": "What is 17 plus 25?"}\n{"prompt": "Count from 3 to 7."}\n')
        write_stub_wheels(emulated.homes[0] / "wheels")
        yield emulated


@pytest.fixture(scope="module", params=TERMINAL_SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def start_line(hosts: EmulatedHosts, request: pytest.FixtureRequest) -> StartLine:
    """Return a function that runs a line of shell in the clone on host 0, in a terminal of one of the sizes."""
    columns, rows = request.param
    path = f"{hosts.folder}/bin:{Path(MLX_K2).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "TERM": "xterm-256color", "MLX_K2_DEVICE": "cpu"}

    @contextmanager
    def run(line: str) -> Iterator[PtyCommand]:
        command = functools.partial(hosts.exec, 0, ["bash", "-c", line], env=environment)
        with on_pty(command, columns, rows, cwd=hosts.homes[0] / "mlx-k2") as pane:
            yield pane
        sys.stdout.write(f"$ {line}\n{pane.shown}\n")  # pytest -rP shows it

    return run


def from_readme(line: str) -> str:
    """Return ``line``, and check that README.md has it."""
    assert re.search(rf"^    {re.escape(line)}( +#.*)?$", README.read_text(), re.MULTILINE), line
    return line


def check(start_line: StartLine, line: str, *expected_texts: str, code: int = 0) -> str:
    """Run a line to its end; check its exit code and that it prints the texts. Return all that it printed."""
    with start_line(line) as pane:
        assert pane.end(TIMEOUT_S) == code, pane.shown
    output = " ".join(pane.shown.split())
    for text in expected_texts:
        assert text in output, pane.shown
    return pane.shown


def test_the_error_about_a_misspelt_command_names_the_right_one(start_line: StartLine) -> None:
    check(start_line, "mlx-k2 genrate Hello", "did you mean generate?", code=2)
    check(start_line, "mlx-k2 Hello there", "to ask it, write mlx-k2 generate 'Hello there'", code=2)


def test_setup_writes_what_all_later_commands_use(start_line: StartLine, hosts: EmulatedHosts) -> None:
    check(start_line, "mlx-k2 setup this nobody.invalid", "its name cannot be resolved", "nothing was changed", code=2)
    line = from_readme("mlx-k2 setup this mac-2 --model moonshotai/Kimi-K2-Thinking")
    line = line.replace("mac-2", "host-1 host-2").replace("moonshotai/Kimi-K2-Thinking", "built-in")
    # with the second terminal size, everything is set up already
    is_first = not (hosts.homes[0] / ".config" / "mlx-k2" / "hosts.json").exists()
    with start_line(f"{line} --python {shlex.quote(sys.executable)} --wheels ~/wheels") as pane:
        if is_first:
            pane.wait_for("Install mlx-k2", TIMEOUT_S)
            pane.type("y")
            pane.wait_for("is installed on host-2", TIMEOUT_S)
            pane.wait_for("Write ", TIMEOUT_S)
            pane.type("y")
        pane.wait_for("0 failure", TIMEOUT_S)
        assert pane.end(TIMEOUT_S) == 0, pane.shown
    check(start_line, from_readme("mlx-k2 config"), 'model = "built-in"', "config.toml, line")
    check(start_line, from_readme("mlx-k2 doctor"), "host-1", "host-2", "hop", "0 failure")
    check(start_line, from_readme("mlx-k2 generate --dry-run"), "host-2", "read per token", "nothing was started")


def test_the_demo_answers_and_text_from_a_pipe_is_added_to_the_prompt(start_line: StartLine) -> None:
    command = from_readme('mlx-k2 generate "What is mlx-k2?"')
    output = check(start_line, command, "runs Kimi K2 models over several Macs")
    assert len([line for line in output.splitlines() if "tok/s" in line]) == 1
    check(start_line, from_readme('echo 3 to 12. | mlx-k2 generate -p "Count from" --max-tokens 200'), "3, 4, 5, 6, 7")
    check(start_line, 'mlx-k2 generate --temprature 0 "Hello"', "Did you mean '--temperature'?", code=2)


def test_the_chat_calls_a_tool_after_the_user_has_approved_the_call(start_line: StartLine) -> None:
    check(start_line, 'mlx-k2 chat --tools nowhere.py "Hello"', "there is no Python file nowhere.py", code=2)
    with start_line(from_readme('mlx-k2 chat --tools examples/tools.py "How much does the lamp cost?"')) as pane:
        pane.wait_for("run it?", TIMEOUT_S)
        pane.type("y")
        pane.wait_for("30", TIMEOUT_S)
        pane.wait_for("stages")
        pane.type("/sav")
        pane.wait_for("there is no command /sav")
        pane.type("quit")
        assert pane.end(TIMEOUT_S) == 0, pane.shown


def test_a_file_of_prompts_is_answered(start_line: StartLine, hosts: EmulatedHosts) -> None:
    results = hosts.homes[0] / "mlx-k2" / "results.jsonl"
    results.unlink(missing_ok=True)
    check(start_line, "mlx-k2 generate --prompts prompts.jsonl", "--prompts and --out go together: give both", code=2)
    line = "mlx-k2 generate --prompts prompts.jsonl --out results.jsonl --temp 0"
    check(start_line, line, "2 results are in results.jsonl")
    assert "17 + 25 = 42" in results.read_text().splitlines()[0]


def test_the_server_answers_a_client_and_ends_with_ctrl_c(start_line: StartLine) -> None:
    with start_line(from_readme("mlx-k2 serve")) as server:
        server.wait_for("serving ", TIMEOUT_S)
        server.wait_for("requests at once")
        (curl,) = [line.strip() for line in README.read_text().splitlines() if line.startswith("    curl ")]
        check(start_line, curl.replace("curl ", "curl --silent ", 1), "17 + 25 = 42")
        check(start_line, 'mlx-k2 generate --connect http://127.0.0.1:8080 "What is 17 plus 25?"', "17 + 25 = 42")
        check(start_line, 'mlx-k2 generate --connect http://127.0.0.1:8081 "Hello"', "error: ", code=2)
        check(start_line, "mlx-k2 serve", "8080", code=2)
        server.press(b"\x03")
        server.wait_for("ending", TIMEOUT_S)
        assert server.end(TIMEOUT_S) in (0, 130), server.shown


def test_bench_prints_its_rows_and_writes_a_plot(start_line: StartLine, hosts: EmulatedHosts) -> None:
    check(start_line, "mlx-k2 bench --plot nowhere/speed.png", "there is no folder", code=2)
    plot = hosts.homes[0] / "mlx-k2" / "speed.png"
    plot.unlink(missing_ok=True)
    line = from_readme("mlx-k2 bench --prompt-lengths 128 --generate 32 --streams 1,2 --plot speed.png")
    check(start_line, line, "prefill", "p95 ms")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert hosts.all_processes() == {}
