"""Tests that nothing that a model, a tool, a host or a file writes reaches a terminal as a control sequence."""

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
from tests.cli.command import MLX_K2, CommandLine
from tests.cli.untrusted_output import END, WAYS
from tests.examples import scaled

OURS = re.compile(
    r"\x1b\[(?:\?25[lh]|[0-9]*A|2K|1A|[0-9;]*m)|\r"  # cursor on and off, up, erase the line; colours; line start
)
"""The sequences that rich writes for spinners, bars and styles."""
STYLE = re.compile(r"\x1b\[([0-9;]*)m")
NEVER_OURS = "7;21;53"
"""SGR parameters that rich never writes together, so that those on the terminal are the text's."""
PAYLOADS = (
    "\x1b]52;c;cm0gLXJmIH4K\x07",
    "\x1b]0;title\x1b\\",
    "\x1b]8;;https://evil.invalid\x1b\\text\x1b]8;;\x1b\\",
    "\x1b[2J\x1b[H",
    "\x9b2J",
    "\x90q\x9c",
    f"\x1b[{NEVER_OURS}m",
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
TEXTS = st.one_of(st.sampled_from(PAYLOADS), st.text(st.characters(max_codepoint=0xFF), max_size=8), st.text())


class Shown:
    """The program of untrusted_output.py on a terminal."""

    def __init__(self) -> None:
        self._terminal, inner = os.openpty()
        settings_ = termios.tcgetattr(inner)
        settings_[1] &= ~termios.OPOST  # every byte as it was written
        termios.tcsetattr(inner, termios.TCSANOW, settings_)
        read_end, self._texts = os.pipe()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.untrusted_output", str(read_end)],
            stdin=subprocess.DEVNULL,
            stdout=inner,
            stderr=inner,
            env=environment,
            pass_fds=[read_end],
        )
        os.close(inner)
        os.close(read_end)

    def of(self, way: str, parts: list[str]) -> str:
        """Return what the terminal gets for ``parts``."""
        line = json.dumps({"way": way, "parts": parts}).encode() + b"\n"
        writer = threading.Thread(target=os.write, args=(self._texts, line))
        writer.start()
        got = b""
        while not got.endswith(END.encode()):
            got += os.read(self._terminal, 65536)  # an error if the program has ended
        writer.join()
        return got.decode().removesuffix(END)

    def close(self) -> None:
        os.close(self._texts)
        assert self.process.wait(20) == 0
        os.close(self._terminal)


@pytest.fixture(scope="module")
def shown() -> Iterator[Shown]:
    program = Shown()
    yield program
    program.close()


def check_harmless(output: str) -> None:
    """Check that ``output`` has no control sequence but those that rich writes."""
    rest = OURS.sub("", output)
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", rest) is None, repr(rest)
    assert not [style for style in STYLE.findall(output) if NEVER_OURS in style], repr(output)


@pytest.mark.parametrize("way", WAYS)
@given(parts=st.lists(TEXTS, max_size=3))
@example(parts=list(PAYLOADS))
@example(parts=["See <https://x.y/%1b]52;c;cm0gLXJmIH4K%1b\\>"])
@settings(max_examples=scaled(25))
def test_no_control_sequence_in_what_others_wrote_reaches_the_terminal(
    shown: Shown, way: str, parts: list[str]
) -> None:
    check_harmless(shown.of(way, parts))


def test_a_link_shows_its_address(shown: Shown) -> None:
    output = STYLE.sub("", shown.of("rich", ["See [https://bank.invalid](https://evil.invalid)."]))
    assert "https://bank.invalid (https://evil.invalid)" in output


def on_terminal(command_line: CommandLine, *arguments: str) -> str:
    """Run the command on a terminal, and return all that it writes."""
    terminal, inner = os.openpty()
    with subprocess.Popen(
        [MLX_K2, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=inner,
        stderr=inner,
        env=command_line.environment(TERM="xterm-256color"),
    ):
        os.close(inner)
        output = b""
        try:
            while part := os.read(terminal, 65536):
                output += part
        except OSError:  # the end of the command, on Linux
            pass
    os.close(terminal)
    return output.decode()


HOSTILE = "\x1b]52;c;cm0=\x07\x9b2J"


def test_a_hostfile_s_key_and_a_tensor_s_name_reach_the_terminal_as_text(
    command_line: CommandLine, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([{"ssh": "127.0.0.1", f"key{HOSTILE}": 1}]))
    model = tmp_path / "model"
    model.mkdir()
    for file in BUILTIN_FOLDER.iterdir():
        (model / file.name).symlink_to(file)
    index = json.loads((model / "model.safetensors.index.json").read_bytes())
    index["weight_map"][f"name{HOSTILE}"] = "a.safetensors"
    (model / "model.safetensors.index.json").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    output = on_terminal(command_line, "generate", "--hostfile", str(hosts), "--model", str(model), "Hi")
    assert "key\ufffd" in output and "name\ufffd" in output
    check_harmless(output)


def test_a_template_s_refusal_reaches_the_terminal_as_text(command_line: CommandLine, tmp_path: Path) -> None:
    for file in BUILTIN_FOLDER.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no" + HOSTILE + "') }}")
    output = on_terminal(command_line, "generate", "--model", str(tmp_path), "Hi")
    assert "refuses these messages: no\ufffd" in output
    check_harmless(output)
