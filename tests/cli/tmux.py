"""A terminal in tmux: a test runs a command in it, types keys and reads the text, scrollback included."""

import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

needs_tmux = pytest.mark.skipif(
    shutil.which("tmux") is None, reason="needs tmux: apt install tmux, or brew install tmux"
)

_POLL_INTERVAL_S = 0.05
_TIMEOUT_S = 40.0


@dataclass(frozen=True)
class Terminal:
    """The only pane of a tmux server."""

    socket: Path

    def type(self, *keys: str) -> None:
        """Press keys by tmux's names, such as Enter and C-c. Type any other string as text."""
        self._tmux("send-keys", "-t", "pane", *keys)

    def send_message(self, text: str) -> None:
        """Type ``text`` literally and press Enter."""
        self._tmux("send-keys", "-t", "pane", "-l", text)
        self.type("Enter")

    def resize(self, columns: int, rows: int) -> None:
        self._tmux("resize-window", "-t", "pane", "-x", str(columns), "-y", str(rows))

    def text(self, *, with_colours: bool = False) -> str:
        """Return the visible text and the scrollback."""
        return self._tmux("capture-pane", "-p", "-S", "-", "-t", "pane", *(["-e"] if with_colours else []))

    def wait_for(self, text: str, times: int = 1) -> str:
        """Wait, at most 40 s, until `self.text()` has ``text`` at least ``times`` times, and return it."""
        deadline = time.monotonic() + _TIMEOUT_S
        while (all_text := self.text()).count(text) < times:
            assert time.monotonic() < deadline, f"never saw {text!r} {times} times:\n{all_text}"
            threading.Event().wait(_POLL_INTERVAL_S)
        return all_text

    @property
    def shell_pid(self) -> int:
        """The process id of the shell that runs the command."""
        return int(self._tmux("display-message", "-p", "-t", "pane", "#{pane_pid}"))

    @property
    def tty(self) -> Path:
        """The terminal's device."""
        return Path(self._tmux("display-message", "-p", "-t", "pane", "#{pane_tty}").strip())

    def processes(self) -> list[psutil.Process]:
        """Return the command's process and all its descendants."""
        return psutil.Process(self.shell_pid).children(recursive=True)

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-S", str(self.socket), *arguments]
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8", timeout=20).stdout


@contextmanager
def terminal(
    folder: Path, command: Sequence[str], environment: Mapping[str, str], columns: int = 160, rows: int = 24
) -> Iterator[Terminal]:
    """Run ``command`` in a terminal. After the command's end the terminal stays open and shows ``exit code N``."""
    socket = folder / "tmux"
    line = f"env -i {shlex.join(f'{name}={value}' for name, value in environment.items())} {shlex.join(command)}"
    size = ("-x", str(columns), "-y", str(rows))
    start = ["tmux", "-f", "/dev/null", "-S", str(socket), "new-session", "-d", "-s", "pane", *size]
    _start([*start, f"{line}; echo exit code $?; read _"])
    try:
        yield Terminal(socket)
    finally:
        subprocess.run(["tmux", "-S", str(socket), "kill-server"], capture_output=True, timeout=20)


def _start(command: Sequence[str]) -> None:
    """Start tmux. Retry once, because a tmux server sometimes "exited unexpectedly" at its start."""
    if subprocess.run(command, timeout=20).returncode != 0:
        subprocess.run(command, check=True, timeout=20)
