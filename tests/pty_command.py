"""A command on a pseudo-terminal of a given size: types lines, waits for text, keeps all that was shown."""

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
from dataclasses import dataclass, field
from typing import Any

_CONTROL = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_=>])|[\x00-\x08\x0b-\x1f]")


@dataclass
class PtyCommand:
    """A running command and its terminal."""

    process: subprocess.Popen[bytes]
    terminal: int
    shown: str = ""
    _seen: int = field(default=0)

    def wait_for(self, text: str, timeout_s: float = 60.0) -> str:
        """Wait until ``text`` is shown after what was waited for before; return the text up to it."""
        deadline = time.monotonic() + timeout_s
        while (at := self.shown.find(text, self._seen)) < 0:
            assert self._read(deadline), f"never saw {text!r} in:\n{self.shown}"
        found, self._seen = self.shown[self._seen : at], at + len(text)
        return found

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
        """Read what is shown next; return whether there was something before the deadline or the end."""
        if not select.select([self.terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self.terminal, 65536)
        except OSError:  # Linux reports the end so
            return False
        for _ in range(data.count(b"\x1b[6n")):  # where is the cursor?
            os.write(self.terminal, b"\x1b[1;1R")
        self.shown += _CONTROL.sub("", data.decode(errors="replace").replace("\r\n", "\n"))
        return bool(data)


@contextmanager
def on_pty(
    start: Callable[..., subprocess.Popen[bytes]], columns: int = 80, rows: int = 24, **options: Any
) -> Iterator[PtyCommand]:
    """Start a command with a terminal as its three streams. ``start`` is called with Popen's options."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = start(stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=_own_terminal, **options)
    os.close(theirs)
    try:
        yield PtyCommand(process, ours)
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)


def _own_terminal() -> None:
    """Make the terminal the controlling one of a new session, so that Ctrl-C sends SIGINT."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
