"""Outlives the guard by a moment: ends the stage when the guard was killed or has stopped. Knows no frames.

The stage may be unable to notice by itself: mlx.distributed.init holds the GIL, so no thread of it reads its input.
This process leads the process group that the stage is in. So long as it lives the group's number cannot be given to
others, and a signal to "my group" needs no process id. It is portable: a pipe's end of file and POSIX process groups.
"""

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from mlx_k2.protocol.guard_messages import POLITE_S

POLL_S = 0.05


class Watch(NamedTuple):
    """One line from the guard, sent several times a second; the last one counts."""

    child_pid: int
    kill_after_s: float
    silence_s: float

    def to_line(self) -> bytes:
        """The line."""
        return f"{self.child_pid} {self.kill_after_s} {self.silence_s}\n".encode()

    @classmethod
    def from_line(cls, line: bytes) -> "Watch":
        """What ``to_line`` wrote."""
        child_pid, kill_after_s, silence_s = line.split()
        return cls(int(child_pid), float(kill_after_s), float(silence_s))


def main() -> None:
    """Run until the guard is gone, then end this process group, and so this process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    guard_pid = os.getppid()
    watch, guard_is_stopped = _follow_guard(fd=0)
    if guard_is_stopped:  # it still holds the pipe, so it lives and its number is its own
        os.kill(guard_pid, signal.SIGKILL)
    if watch is not None:
        _end_group(watch)
    os.killpg(0, signal.SIGKILL)


def _follow_guard(fd: int) -> tuple[Watch | None, bool]:
    """Read lines until the guard ends, or falls silent: the last line, and whether it was silence."""
    watch = None
    silent_s = 0.0  # counted in our own turns, so that a sleeping machine is not a silent guard
    while watch is None or silent_s < watch.silence_s:
        readable, _, _ = select.select([fd], [], [], 1.0)
        silent_s = 0.0 if readable else silent_s + 1.0
        if readable:
            lines = os.read(fd, 65536)  # whole lines only: each is far shorter than PIPE_BUF
            if not lines:
                return watch, False
            watch = Watch.from_line(lines.splitlines()[-1])
    return watch, True


def _end_group(watch: Watch) -> None:
    """Wait for the stage, which has seen the end of its input; then SIGTERM, which a stopped one sees after SIGCONT."""
    began = time.monotonic()
    if not _wait_until(lambda: not _is_alive(watch.child_pid), began + POLITE_S):
        os.killpg(0, signal.SIGTERM)
        os.killpg(0, signal.SIGCONT)
        _wait_until(lambda: not _is_alive(watch.child_pid), began + watch.kill_after_s)


def _wait_until(condition: Callable[[], bool], deadline: float) -> bool:
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return holds


def _is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return not _is_zombie(pid)
    return False


def _is_zombie(pid: int) -> bool:
    """Whether an orphan has ended and init has not noticed, which on Linux may take it seconds; macOS's is quick."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123  # as light as this process
            return file.read().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return False


if __name__ == "__main__":
    main()
