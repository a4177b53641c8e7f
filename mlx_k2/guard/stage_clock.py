"""How long the stage has stood where it stands, as its guard counts. Standard library only.

Time is counted in the guard's own turns, so that a machine that slept does not find its stage late.
"""

import os
import sys
from contextlib import suppress

from mlx_k2.protocol.stage_status import Phase, PhaseUpdate, StageStatus


class StageClock:
    """The stage's last announcement, and for how long it has held."""

    def __init__(self) -> None:
        self._status = StageStatus(PhaseUpdate(Phase.STARTING), 0.0)  # replaced whole: two threads set it
        self._is_stopped = False

    def on_phase(self, update: PhaseUpdate) -> None:
        """The stage says where it stands."""
        self._status = StageStatus(update, 0.0)

    def tick(self, tick_s: float, pid: int) -> None:
        """So much time has passed; look whether process ``pid``, a child, is stopped."""
        before = self._status
        self._is_stopped = _is_stopped(pid, self._is_stopped)
        stopped_s = before.stopped_s + tick_s if self._is_stopped else 0.0
        aged = StageStatus(before.update, before.for_s + tick_s, stopped_s)
        if self._status is before:  # else a new announcement came meanwhile
            self._status = aged

    def status(self) -> StageStatus:
        """What the coordinator is told."""
        return self._status

    def overdue(self) -> str | None:
        """Why the stage has to end: its phase has outlived its limit."""
        now = self._status
        limit_s = now.update.limit_s
        if limit_s is None or now.for_s <= limit_s:
            return None
        return f"it was {now.update} for {now.for_s:.0f} s, and was given {limit_s:.0f} s"


def _is_stopped(pid: int, before: bool) -> bool:
    """Whether a child is stopped, by a signal or a debugger; never takes its exit from whoever waits for that.

    Python has no waitid on macOS before 3.13: a stopped stage is then found by its step's deadline alone.
    """
    if sys.platform == "darwin" and not hasattr(os, "waitid"):
        return False
    with suppress(ChildProcessError):
        while (change := os.waitid(os.P_PID, pid, os.WSTOPPED | os.WCONTINUED | os.WNOHANG)) is not None:
            before = change.si_code in (os.CLD_STOPPED, os.CLD_TRAPPED)
    return before
