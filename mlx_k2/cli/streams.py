"""The standard streams of the process: closed and non-blocking ones, and text that their encoding cannot hold."""

import io
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from mlx_k2.cli.terminal_text import json_line


class _Messages(io.FileIO):
    """Standard error: a message that cannot be written, to a full disk or a closed pipe, is lost and ends nothing."""

    def write(self, data: Any, /) -> int:
        """Write bytes and return how many were written or lost."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def prepare_streams() -> str | None:
    """Make the standard streams usable; return the problem if they cannot be.

    A byte of standard input that is not text is read as U+FFFD. A character that an output's encoding lacks is written
    as an escape. Other programs can have left a pipe or a terminal non-blocking.
    """
    for descriptor in (0, 1, 2):
        try:
            os.set_blocking(descriptor, True)
        except OSError:  # closed: take its number, which the next file that is opened would get otherwise
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - it is open until the process ends
    elif isinstance(sys.stderr, io.TextIOWrapper):
        messages = io.BufferedWriter(_Messages(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(messages, sys.stderr.encoding, line_buffering=True)
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    return "standard output is closed: redirect it, for instance to /dev/null" if sys.stdout is None else None


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a standard stream, which is None if it was closed, is a terminal."""
    return stream is not None and stream.isatty()


def is_dumb() -> bool:
    """Return whether the terminal can only show lines, by its TERM."""
    return os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")


def refuses_colour() -> bool:
    """Return whether the user wants no colours."""
    return bool(os.environ.get("NO_COLOR"))


def write_json_line(value: object) -> None:
    """Write ``value`` to standard output as a line of JSON that is safe on a terminal."""
    write_utf8(json_line(value))


def write_utf8(text: str) -> None:
    """Write text to standard output as UTF-8, whatever the locale's encoding is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()
