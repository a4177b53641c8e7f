"""The watchdog process, which ends the stage when the guard was killed or is suspended. Knows no frames.

The stage itself may not detect the end of its guard: while mlx.distributed.init holds the GIL, no thread of the stage
reads its input. The watchdog leads the process group that the stage is in. While the watchdog runs, the group's number
cannot be reused, and a signal to its own group needs no process id. It relies only on a pipe's end of file and on POSIX
process groups, which are portable.
"""

import os
import select
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

from mlx_k2.protocol.guard_messages import TERMINATE_AFTER_S

POLL_S = 0.05


class Watch(NamedTuple):
    """The watchdog's orders, which the guard sends as one line several times a second. The last line counts.

    ``kill_after_s`` is the time from the end of the stage's input to SIGKILL. After ``silence_s`` without a line the
    guard counts as suspended.
    """

    child_pid: int
    kill_after_s: float
    silence_s: float

    def to_line(self) -> bytes:
        """Return the orders as one line."""
        return f"{self.child_pid} {self.kill_after_s} {self.silence_s}\n".encode()

    @classmethod
    def from_line(cls, line: bytes) -> "Watch":
        """Decode a line that ``to_line`` encoded."""
        child_pid, kill_after_s, silence_s = line.split()
        return cls(int(child_pid), float(kill_after_s), float(silence_s))


def main() -> None:
    """Run until the guard has ended or is suspended, then end this process group, including this process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # _end_group sends SIGTERM to this process, too
    guard_pid = os.getppid()
    watch, is_suspended = _follow_guard(fd=0)
    if is_suspended:  # the guard's end of the pipe is open, so it exists and its process id was not reused
        os.kill(guard_pid, signal.SIGKILL)
    if watch is not None:  # None: the guard ended before it could send orders
        _end_group(watch)
    os.killpg(0, signal.SIGKILL)


def _follow_guard(fd: int) -> tuple[Watch | None, bool]:
    """Read lines until the guard ends or is silent for too long; return the last line, and whether it was silent."""
    watch = None
    silent_s = 0.0  # counted in loop iterations, so that this host's sleep does not count as silence
    while watch is None or silent_s < watch.silence_s:
        readable, _, _ = select.select([fd], [], [], 1.0)
        silent_s = 0.0 if readable else silent_s + 1.0
        if readable:
            lines = os.read(fd, 65536)  # whole lines only: writes shorter than PIPE_BUF are atomic
            if not lines:
                return watch, False
            watch = Watch.from_line(lines.splitlines()[-1])
    return watch, True


def _end_group(watch: Watch) -> None:
    """Wait for the stage, whose input has ended; then send SIGTERM. A suspended process receives it after SIGCONT."""
    began = time.monotonic()
    if not _wait_until(lambda: not _is_alive(watch.child_pid), began + TERMINATE_AFTER_S):
        os.killpg(0, signal.SIGTERM)
        os.killpg(0, signal.SIGCONT)
        _wait_until(lambda: not _is_alive(watch.child_pid), began + watch.kill_after_s)


def _wait_until(condition: Callable[[], bool], deadline: float) -> bool:
    """Wait until the condition is true or the deadline (monotonic seconds) has passed; return whether it is true."""
    while not (is_true := condition()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return is_true


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Return whether an orphan has ended but init has not reaped it yet, which on Linux may take seconds.

    On macOS init is quick, and there is no /proc: return False.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123  # this small process does not import pathlib
            return file.read().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return False


if __name__ == "__main__":
    main()
