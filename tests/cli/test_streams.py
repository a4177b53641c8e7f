"""Tests of standard streams with any bytes, encodings and closed ends, and of pipes and devices as files."""

import io
import json
import os
import pty
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
def replaced_stream(name: str, data: bytes, encoding: str, errors: str) -> Iterator[io.BytesIO]:
    """Replace ``sys.stdin`` or ``sys.stdout`` by a text stream over a buffer of ``data``. Yield the buffer.

    prepare_streams has prepared the stream, which Python has opened with the ``encoding`` and ``errors`` of a locale.
    """
    raw = io.BytesIO(data)
    stream = io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline="\n")
    # Patching stderr by itself restores it afterwards, since prepare_streams replaces it too.
    with patch.object(sys, "stderr", sys.stderr), patch.object(sys, name, stream):
        assert prepare_streams() is None
        yield raw
        stream.detach()


def lines_from(keyboard: LineKeyboard) -> tuple[list[str], int]:
    """Return the lines that are text, and the number of the other lines, which are refused."""
    lines, num_refused = [], 0
    while True:
        try:
            lines.append(keyboard.read())
        except RequestError:
            num_refused += 1
        except EOFError:
            return lines, num_refused


def is_text(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


@given(data=st.binary(), encoding=ENCODINGS, errors=st.sampled_from(["strict", "surrogateescape"]))
def test_a_line_of_any_bytes_is_refused_or_can_be_saved_and_written_to_a_transcript(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, encoding: str, errors: str
) -> None:
    folder = tmp_path_factory.mktemp("chat")
    with replaced_stream("stdin", data, encoding, errors):
        lines, num_refused = lines_from(LineKeyboard())
    assert (num_refused == 0) == is_text(data, encoding)
    messages = [{"role": "user", "content": line} for line in lines]
    with Transcript(folder / "t", pytest.fail) as transcript:
        for message in messages:
            transcript.write({"message": message})
    save_chat(folder / "s", SavedChat("m", "d", messages))
    assert load_chat(folder / "s", "d") == messages
    transcript_lines = (folder / "t").read_bytes().splitlines()
    assert [json.loads(line)["message"] for line in transcript_lines] == messages


@given(text=st.text(), encoding=ENCODINGS)
def test_characters_that_standard_outputs_encoding_does_not_have_are_written_as_escapes(
    text: str, encoding: str
) -> None:
    with replaced_stream("stdout", b"", encoding, "strict") as raw:
        PlainScreen(show_thinking=False).show_event(Content(text))
        sys.stdout.flush()
        output = raw.getvalue().decode(encoding)
    assert output == text.encode(encoding, "backslashreplace").decode(encoding)


@given(text=st.text(st.characters(exclude_categories=["Cs"])), encoding=ENCODINGS)
def test_lines_of_json_are_utf_8_whatever_the_encoding_of_standard_output_is(text: str, encoding: str) -> None:
    with replaced_stream("stdout", b"", encoding, "strict") as raw:
        write_utf8(json_line({"text": text}))
        assert json.loads(raw.getvalue().decode("utf-8")) == {"text": text}
        assert raw.getvalue().count(b"\n") == 1


@pytest.mark.parametrize(
    ("redirections", "command", "error"),
    [
        (">&-", "generate Hi", "error: standard output is closed: redirect it, for instance to /dev/null\n"),
        (">&- 2>&-", "doctor --json", ""),
        ("<&-", "chat", "error: there is no standard input: redirect it from a file with a message a line\n"),
    ],
)
def test_a_closed_stream_is_an_error_of_one_line(redirections: str, command: str, error: str) -> None:
    script = ["bash", "-c", f"exec {redirections}; exec {MLX_K2} {command}"]
    result = subprocess.run(script, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=50)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", error)


PREPARE_STREAMS = """
import os
from mlx_k2.cli.streams import prepare_streams
assert prepare_streams() is None
next_file = os.open(os.devnull, os.O_RDONLY)
print(os.get_blocking(0), os.get_blocking(1), next_file > 2)
"""


def test_a_non_blocking_pipe_becomes_blocking_and_no_file_gets_a_closed_streams_number() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    command = ["bash", "-c", 'exec 2>&-; exec "$0" -c "$1"', sys.executable, PREPARE_STREAMS]
    subprocess.run(command, stdin=read_end, stdout=write_end, timeout=50, check=True)
    assert os.read(read_end, 100) == b"True True True\n"
    os.close(read_end)
    os.close(write_end)


def test_a_named_pipe_without_a_reader_is_refused_as_a_transcript_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match="pipe cannot be written: No such device or address"):
        Transcript(tmp_path / "pipe", pytest.fail)


def test_a_transcript_goes_to_the_reader_of_a_named_pipe_until_the_reader_ends(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    warnings: list[str] = []
    with Transcript(tmp_path / "pipe", warnings.append) as transcript:
        transcript.write({"command": "/help"})
        assert json.loads(os.read(reader, 1000))["command"] == "/help"
        os.close(reader)
        transcript.write({"command": "/help"})
    (warning,) = warnings
    assert "Broken pipe" in warning


@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_a_pipe_or_a_device_is_neither_read_nor_replaced_by_load_and_save(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / name
    with pytest.raises(RequestError, match=f"{path} is not a regular file"):
        load_chat(path, "d")
    with pytest.raises(RequestError, match=f"{path} is not a regular file"):
        save_chat(path, SavedChat("m", "d", []))
    assert not path.is_file()


HOLD_KEYS = """
import os, select, sys, termios
from mlx_k2.cli.repl.keyboard import without_echo

fails = sys.argv[1] == "fails"
try:
    with without_echo():
        print("ready", flush=True)
        select.select([0], [], [])
        if fails:
            raise ValueError
except ValueError:
    pass
has_keys = bool(select.select([0], [], [], 0)[0])
print("echo", bool(termios.tcgetattr(0)[3] & termios.ECHO), "keys", has_keys)
"""


@pytest.mark.parametrize(("end", "output"), [("ends", "echo True keys True"), ("fails", "echo True keys False")])
def test_keys_typed_during_a_failed_start_do_not_reach_the_shell(end: str, output: str) -> None:
    controller, program_side = pty.openpty()
    command = [sys.executable, "-c", HOLD_KEYS, end]
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen(command, stdin=program_side, stdout=program_side, env=environment) as process:
        os.close(program_side)
        shown = os.read(controller, 100)
        assert b"ready" in shown
        os.write(controller, b"rm -r /tmp/x\r")
        assert process.wait(60) == 0
    shown += os.read(controller, 100)
    os.close(controller)
    assert b"rm" not in shown  # not echoed
    assert output.encode() in shown
