"""A command that runs on a pseudo-terminal: a test types lines, waits for text, and reads all text shown so far."""

import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_CONTROL = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_=>])|[\x00-\x08\x0b-\x1f]")


@dataclass
class PtyCommand:
    """A running command, the file descriptor of its terminal, and all text ``shown`` so far, without escape codes."""

    process: subprocess.Popen[bytes]
    terminal: int
    shown: str = ""
    _search_start: int = 0

    def wait_for(self, text: str, timeout_s: float = 60.0) -> str:
        """Wait until ``text`` is shown after the text of the last call. Return what is shown between the two."""
        deadline = time.monotonic() + timeout_s
        while (start := self.shown.find(text, self._search_start)) < 0:
            assert self._read(deadline), f"never saw {text!r} in:\n{self.shown}"
        between, self._search_start = self.shown[self._search_start : start], start + len(text)
        return between

    def type(self, text: str) -> None:
        """Type a line."""
        os.write(self.terminal, f"{text}\r".encode())

    def press(self, keys: bytes) -> None:
        """Press keys, for instance b"\\x03" for Ctrl-C."""
        os.write(self.terminal, keys)

    def end(self, timeout_s: float = 60.0) -> int:
        """Wait for the end of the command; return its exit code."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline):
            pass
        return self.process.wait(max(1.0, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        """Read what is shown next. Return False at the deadline or at the end of the command."""
        if not select.select([self.terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self.terminal, 65536)
        except OSError:  # on Linux, the end
            return False
        for _ in range(data.count(b"\x1b[6n")):  # the command asks for the cursor's position
            os.write(self.terminal, b"\x1b[1;1R")
        self.shown += _CONTROL.sub("", data.decode(errors="replace").replace("\r\n", "\n"))
        return bool(data)


@contextmanager
def on_pty(
    start: Callable[..., subprocess.Popen[bytes]], columns: int = 80, rows: int = 24, **options: Any
) -> Iterator[PtyCommand]:
    """Start a command with a terminal as its three streams, and kill it on exit.

    ``start`` is called with Popen's options for the streams, and with ``options``.
    """
    our_end, command_end = os.openpty()
    fcntl.ioctl(command_end, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), command_end)
    process = start(**streams, preexec_fn=_start_terminal_session, **options)
    os.close(command_end)
    try:
        yield PtyCommand(process, our_end)
    finally:
        process.kill()
        process.wait(10)
        os.close(our_end)


def _start_terminal_session() -> None:
    """Make the terminal the controlling one of a new session, so that Ctrl-C sends SIGINT."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
