"""The clock of a stage's phase, which its guard advances. Standard library only.

Time is counted in the guard's loop iterations, so that time for which the machine slept does not count.
"""

import os
import sys
from contextlib import suppress

from mlx_k2.protocol.stage_status import Phase, PhaseUpdate, StageStatus


class StageClock:
    """The stage's last phase update, and for how long it has held."""

    def __init__(self) -> None:
        self._status = StageStatus(PhaseUpdate(Phase.STARTING), 0.0)  # replaced, never changed: two threads set it
        self._is_stopped = False

    def on_phase(self, update: PhaseUpdate) -> None:
        """Store the stage's new phase and restart the clock."""
        self._status = StageStatus(update, 0.0)

    def tick(self, tick_s: float, pid: int) -> None:
        """Add ``tick_s`` to the clock, and check whether process ``pid``, a child of this process, is stopped."""
        before = self._status
        self._is_stopped = _is_stopped(pid, self._is_stopped)
        stopped_s = before.stopped_s + tick_s if self._is_stopped else 0.0
        aged = StageStatus(before.update, before.for_s + tick_s, stopped_s)
        if self._status is before:  # else on_phase has replaced it meanwhile
            self._status = aged

    def status(self) -> StageStatus:
        """Return the status to send to the coordinator."""
        return self._status

    def overdue(self) -> str | None:
        """Return why the stage must end if its phase has outlasted its limit, else None."""
        now = self._status
        limit_s = now.update.limit_s
        if limit_s is None or now.for_s <= limit_s:
            return None
        return f"it was {now.update} for {now.for_s:.0f} s, and was given {limit_s:.0f} s"


def _is_stopped(pid: int, before: bool) -> bool:
    """Return whether a child is stopped, by a signal or a debugger. Do not collect its exit status.

    ``before`` is the last result. Python has no waitid on macOS before 3.13. There the result is always False, and a
    stopped stage is found only as a stuck hop or by the limit of its step.
    """
    if sys.platform == "darwin" and not hasattr(os, "waitid"):
        return False
    with suppress(ChildProcessError):
        while (change := os.waitid(os.P_PID, pid, os.WSTOPPED | os.WCONTINUED | os.WNOHANG)) is not None:
            before = change.si_code in (os.CLD_STOPPED, os.CLD_TRAPPED)
    return before
