"""Tests of the standard streams and of files that are pipes: no traceback, no silent loss, no hang."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.cli.repl.keyboard import LineKeyboard
from mlx_k2.cli.repl.saved_chat import SavedChat, load_chat, save_chat
from mlx_k2.cli.repl.screen import PlainScreen
from mlx_k2.cli.repl.transcript import Transcript
from mlx_k2.cli.streams import prepare_streams, write_utf8
from mlx_k2.cli.terminal_text import json_line
from mlx_k2.errors import RequestError
from mlx_k2.text.reply_parts import Content
from tests.cli.command import MLX_K2

pytestmark = pytest.mark.timeout(60)
ENCODINGS = st.sampled_from(["utf-8", "ascii", "latin-1", "cp1252", "shift_jis"])


@contextmanager
def standard(name: str, data: bytes, encoding: str, errors: str) -> Iterator[io.BytesIO]:
    """Make a standard stream one of these bytes, as Python opens it for a locale; then prepare it."""
    raw = io.BytesIO(data)
    stream = io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline="\n")
    with patch.object(sys, "stderr", sys.stderr), patch.object(sys, name, stream):
        assert prepare_streams() is None
        yield raw
        stream.detach()


def lines_of(keyboard: LineKeyboard) -> Iterator[str]:
    while True:
        try:
            yield keyboard.read()
        except EOFError:
            return


@given(data=st.binary(), encoding=ENCODINGS, errors=st.sampled_from(["strict", "surrogateescape"]))
def test_any_bytes_on_standard_input_can_be_read_saved_and_written_to_a_transcript(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, encoding: str, errors: str
) -> None:
    folder = tmp_path_factory.mktemp("chat")
    with standard("stdin", data, encoding, errors):
        lines = list(lines_of(LineKeyboard()))
    messages = [{"role": "user", "content": line} for line in lines]
    with Transcript(folder / "t", pytest.fail) as transcript:
        for message in messages:
            transcript.write({"message": message})
    save_chat(folder / "s", SavedChat("m", "d", messages))
    assert load_chat(folder / "s", "d") == messages
    written = (folder / "t").read_bytes().splitlines()
    assert [json.loads(line)["message"] for line in written] == messages


@given(text=st.text(), encoding=ENCODINGS)
def test_an_answer_that_the_encoding_of_standard_output_cannot_hold_is_written_with_escapes(
    text: str, encoding: str
) -> None:
    with standard("stdout", b"", encoding, "strict") as raw:
        PlainScreen(show_thinking=False).show_event(Content(text))
        sys.stdout.flush()
        shown = raw.getvalue().decode(encoding)
    assert shown == text.encode(encoding, "backslashreplace").decode(encoding)


@given(text=st.text(st.characters(exclude_categories=["Cs"])), encoding=ENCODINGS)
def test_lines_of_json_are_utf_8_whatever_the_encoding_of_standard_output_is(text: str, encoding: str) -> None:
    with standard("stdout", b"", encoding, "strict") as raw:
        write_utf8(json_line({"text": text}))
        assert json.loads(raw.getvalue().decode("utf-8")) == {"text": text}
        assert raw.getvalue().count(b"\n") == 1


CLOSED = "exec {closed}; exec {command}"


@pytest.mark.parametrize(
    ("closed", "command", "error"),
    [
        (">&-", "generate Hi", "error: standard output is closed: redirect it, for instance to /dev/null\n"),
        (">&- 2>&-", "doctor --json", ""),
        ("<&-", "chat", "error: there is no standard input: redirect it from a file with a message a line\n"),
    ],
)
def test_a_closed_stream_is_one_line_of_error(closed: str, command: str, error: str) -> None:
    script = CLOSED.format(closed=closed, command=f"{MLX_K2} {command}")
    ended = subprocess.run(["bash", "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", error)


PREPARED = """
import os
from mlx_k2.cli.streams import prepare_streams
assert prepare_streams() is None
next_file = os.open(os.devnull, os.O_RDONLY)
print(os.get_blocking(0), os.get_blocking(1), next_file > 2)
"""


def test_a_non_blocking_pipe_becomes_blocking_and_a_closed_streams_number_is_reserved() -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    command = ["bash", "-c", 'exec 2>&-; exec "$0" -c "$1"', sys.executable, PREPARED]
    subprocess.run(command, stdin=read, stdout=write, timeout=50, check=True)
    assert os.read(read, 100) == b"True True True\n"
    os.close(read)
    os.close(write)


def test_a_named_pipe_without_a_reader_is_refused_as_a_transcript_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match="pipe cannot be written: No such device or address"):
        Transcript(tmp_path / "pipe", pytest.fail)


def test_a_transcript_goes_to_the_reader_of_a_named_pipe_until_the_reader_ends(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    problems: list[str] = []
    with Transcript(tmp_path / "pipe", problems.append) as transcript:
        transcript.write({"command": "/help"})
        assert json.loads(os.read(reader, 1000))["command"] == "/help"
        os.close(reader)
        transcript.write({"command": "/help"})
    assert len(problems) == 1
    assert "Broken pipe" in problems[0]


@pytest.mark.parametrize("special", ["pipe", "device"])
def test_a_pipe_or_a_device_is_neither_read_nor_replaced_by_load_and_save(tmp_path: Path, special: str) -> None:
    path = tmp_path / "pipe" if special == "pipe" else Path("/dev/zero")
    if special == "pipe":
        os.mkfifo(path)
    with pytest.raises(RequestError, match=f"{path} is not a regular file"):
        load_chat(path, "d")
    with pytest.raises(RequestError, match=f"{path} is not a regular file"):
        save_chat(path, SavedChat("m", "d", []))
    assert not path.is_file()
