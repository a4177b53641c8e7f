"""Tests that no text of a model, a tool, a host or a file reaches a terminal as a control sequence."""

import json
import os
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_k2.builtin import BUILTIN_FOLDER
from tests.cli.command import MLX_K2, CommandLine, read_terminal
from tests.cli.linked_model import link_model, replace_file
from tests.cli.untrusted_output import DISPLAYS, END
from tests.examples import scaled

RICH_SEQUENCE = re.compile(
    r"\x1b\[(?:\?25[lh]|[0-9]*A|2K|1A|[0-9;]*m)|\r"  # cursor on and off, up, erase the line; colours; line start
)
"""A control sequence that rich writes for spinners, bars and styles."""
STYLE = re.compile(r"\x1b\[([0-9;]*)m")
FOREIGN_STYLE = "7;21;53"
"""SGR parameters that rich never writes together: on the terminal they come from the text."""
PAYLOADS = (
    "\x1b]52;c;cm0gLXJmIH4K\x07",
    "\x1b]0;title\x1b\\",
    "\x1b]8;;https://evil.invalid\x1b\\text\x1b]8;;\x1b\\",
    "\x1b[2J\x1b[H",
    "\x9b2J",
    "\x90q\x9c",
    f"\x1b[{FOREIGN_STYLE}m",
    "\x1bc",
    "\b\b\b\x07\x0e\x7f",
    "<https://x.y/%1b]52;c;cm0gLXJmIH4K%1b%5c%9b2J>",
    "[text](https://x.y/%1b]0;t%07 '%1b]0;t%07')",
    "&#27;]0;title&#7; &#155;2J",
    "`\x1b[2J`",
    "\ud89b\udc1b\n\n",
    "\n```\n\x1b[2J\n```\n",
    "[/x] [bold]",
    "| a | b |\n|---|---|\n| \x1b[2J | \x9b2J |\n",
)
"""Texts with control sequences, also percent-encoded in links, as HTML entities and in code; and with rich's markup."""
TEXTS = st.one_of(st.sampled_from(PAYLOADS), st.text(st.characters(max_codepoint=0xFF), max_size=8), st.text())


class DisplayProgram:
    """The program of untrusted_output.py, running on a pseudo-terminal."""

    def __init__(self) -> None:
        self._controller, terminal = os.openpty()
        attributes = termios.tcgetattr(terminal)
        attributes[1] &= ~termios.OPOST  # the terminal does not change the output
        termios.tcsetattr(terminal, termios.TCSANOW, attributes)
        read_end, self._texts = os.pipe()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.untrusted_output", str(read_end)],
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=terminal,
            env=environment,
            pass_fds=[read_end],
        )
        os.close(terminal)
        os.close(read_end)

    def output_for(self, display: str, parts: list[str]) -> str:
        """Return the output to the terminal for a text in ``parts``. ``display`` is a key of DISPLAYS."""
        line = json.dumps({"display": display, "parts": parts}).encode() + b"\n"
        writer = threading.Thread(target=os.write, args=(self._texts, line))  # blocks if the pipe cannot hold the line
        writer.start()
        output = b""
        while not output.endswith(END.encode()):
            output += os.read(self._controller, 65536)  # raises OSError if the program has ended
        writer.join()
        return output.decode().removesuffix(END)

    def close(self) -> None:
        os.close(self._texts)
        assert self.process.wait(20) == 0
        os.close(self._controller)


@pytest.fixture(scope="module")
def program() -> Iterator[DisplayProgram]:
    program = DisplayProgram()
    yield program
    program.close()


def check_harmless(output: str) -> None:
    """Check that ``output`` has only the control sequences that rich writes."""
    rest = RICH_SEQUENCE.sub("", output)
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", rest) is None, repr(rest)
    assert not [style for style in STYLE.findall(output) if FOREIGN_STYLE in style], repr(output)


@pytest.mark.parametrize("display", DISPLAYS)
@given(parts=st.lists(TEXTS, max_size=3))
@example(parts=list(PAYLOADS))
@example(parts=["See <https://x.y/%1b]52;c;cm0gLXJmIH4K%1b\\>"])
@settings(max_examples=scaled(25))
def test_no_control_sequence_reaches_the_terminal(program: DisplayProgram, display: str, parts: list[str]) -> None:
    check_harmless(program.output_for(display, parts))


def test_a_link_shows_its_address(program: DisplayProgram) -> None:
    output = STYLE.sub("", program.output_for("rich", ["See [https://bank.invalid](https://evil.invalid)."]))
    assert "https://bank.invalid (https://evil.invalid)" in output


def output_on_terminal(command_line: CommandLine, *arguments: str) -> str:
    """Run the command on a pseudo-terminal. Return all that it writes to stdout and stderr."""
    controller, terminal = os.openpty()
    with subprocess.Popen(
        [MLX_K2, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        env=command_line.environment(TERM="xterm-256color"),
    ):
        os.close(terminal)
        return read_terminal(controller)


CONTROL_SEQUENCES = "\x1b]52;c;cm0=\x07\x9b2J"


def test_control_sequences_in_a_key_of_the_hostfile_and_in_a_tensors_name_are_replaced(
    command_line: CommandLine, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([{"ssh": "127.0.0.1", f"key{CONTROL_SEQUENCES}": 1}]))
    model = link_model(BUILTIN_FOLDER, tmp_path / "model")
    index = json.loads((model / "model.safetensors.index.json").read_bytes())
    index["weight_map"][f"name{CONTROL_SEQUENCES}"] = "a.safetensors"
    replace_file(model / "model.safetensors.index.json", json.dumps(index).encode())
    output = output_on_terminal(command_line, "generate", "--hostfile", str(hosts), "--model", str(model), "Hi")
    assert "key\ufffd" in output and "name\ufffd" in output
    check_harmless(output)


def test_control_sequences_in_an_error_of_the_template_are_replaced(command_line: CommandLine, tmp_path: Path) -> None:
    model = link_model(BUILTIN_FOLDER, tmp_path / "model")
    template = "{{ raise_exception('no" + CONTROL_SEQUENCES + "') }}"
    replace_file(model / "chat_template.jinja", template.encode())
    output = output_on_terminal(command_line, "generate", "--model", str(model), "Hi")
    assert "refuses these messages: no\ufffd" in output
    check_harmless(output)
