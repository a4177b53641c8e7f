"""The standard streams of the process: closed or non-blocking ones, and encodings that lack characters."""

import io
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from mlx_k2.cli.terminal_text import json_line


class _LossyFile(io.FileIO):
    """A file whose writes never fail. Data for a full disk or a closed pipe is discarded."""

    def write(self, data: Any, /) -> int:
        """Write bytes and return the number of bytes written or discarded."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def prepare_streams() -> str | None:
    """Make the standard streams usable; return an error message if standard output is closed, else None.

    A byte of standard input that is not text is read as a lone surrogate. A character that an output's encoding lacks
    is written as an escape. Errors of writing to standard error are ignored.
    """
    for descriptor in (0, 1, 2):
        try:
            os.set_blocking(descriptor, True)  # another program may have made the pipe or terminal non-blocking
        except OSError:  # closed: open another file with this number, so that no later file gets the number
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - it is open until the process ends
    elif isinstance(sys.stderr, io.TextIOWrapper):
        lossy_stderr = io.BufferedWriter(_LossyFile(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(lossy_stderr, sys.stderr.encoding, line_buffering=True)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "backslashreplace")
    return "standard output is closed: redirect it, for instance to /dev/null" if sys.stdout is None else None


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a standard stream is a terminal. ``stream`` is None if it was closed."""
    return stream is not None and stream.isatty()


def is_dumb() -> bool:
    """Return whether TERM names a terminal that can only show lines."""
    return os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")


def refuses_colour() -> bool:
    """Return whether NO_COLOR is set."""
    return bool(os.environ.get("NO_COLOR"))


def write_json_line(value: object) -> None:
    """Write ``value`` to standard output as a line of JSON that is safe on a terminal."""
    write_utf8(json_line(value))


def write_utf8(text: str) -> None:
    """Write text to standard output as UTF-8, whatever the locale's encoding is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()
