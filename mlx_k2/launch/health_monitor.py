"""The monitor of a group, which returns the next message of any stage or raises the error that explains why none comes.

While it waits, it detects stopped stages, silent guards and stuck hops. Knows no plan and sets no deadline.
"""

import math
import time
from collections.abc import Collection

from mlx_k2.errors import Cancelled, ClusterError, NeighbourLost, NotFinite, StageFault, StageSilent
from mlx_k2.launch.group import HEARTBEAT_S, StageGroup
from mlx_k2.launch.stage_events import StageEnded, StageMessage, Woken
from mlx_k2.protocol.guard_messages import Phase, StageStatus
from mlx_k2.protocol.messages import Fault

CHECK_INTERVAL_S = 0.5
PAUSE_S = 2.0  # if a wait takes this much longer than it should, this process was suspended or its machine slept
CAUSE_WAIT_S = 2.0
"""After a stage reported a lost neighbour, time to wait for the end of another stage, which is the cause."""
SILENT_S = 3.0
"""If a stage reports a lost neighbour while another guard has been silent for this long, that guard is the cause."""


class HealthMonitor:
    """The monitor of one group.

    The group's ``stall_timeout_s`` limits how long a stage may be stopped, a guard silent or a hop stuck.
    """

    def __init__(self, group: StageGroup) -> None:
        self._group = group
        self._stall_timeout_s = group.stall_timeout_s
        self._late_hops: dict[int, tuple[int | None, float]] = {}
        """For each rank that waits for a step which the stage before has sent: the step, and the start of the wait."""
        self._checked_at = time.monotonic()
        self._reports_from = self._checked_at
        """Time before which neither a stuck stage nor the deadline is reported: the guards may have to answer first."""

    def receive(self, deadline: float, wake_at: float = math.inf) -> StageMessage | Woken | None:
        """Return the next message of any stage; None if none came before ``deadline`` (monotonic seconds).

        Queued messages are returned before a stage is reported as silent. After this process was suspended or its
        machine slept, the guards first get PAUSE_S to answer. Woken is returned at ``wake_at`` (monotonic seconds), and
        after ``StageGroup.wake``.

        Raises:
            Cancelled: the group's ``cancelled`` is set.
            StageStartError, StageFault: a stage ended, or reported a fault.
            StageSilent: a stage is stopped, its guard is silent, or a hop is stuck; names it, its host and its step.
        """
        while True:
            if self._group.cancelled.is_set():
                raise Cancelled("the start was cancelled")
            self._check_for_pause()
            until = min(max(deadline, self._reports_from), wake_at)
            event = self._group.receive(max(0.0, min(CHECK_INTERVAL_S, until - time.monotonic())))
            if isinstance(event, Woken):
                return event
            if isinstance(event, StageEnded):
                raise event.as_error()
            if event is not None:
                if isinstance(event.message, Fault):
                    raise self._fault_error(event.rank, event.message)
                return event
            self._check_for_pause()  # again: the pause may have been during the wait
            now = time.monotonic()
            if now >= self._reports_from:
                self._raise_if_stuck(now)
                if now >= deadline:
                    return None
            if now >= wake_at:
                return Woken()

    def _fault_error(self, rank: int, fault: Fault) -> ClusterError:
        """Return the error for a fault. If a stage lost its neighbour, wait for that one's end or fault."""
        deadline = time.monotonic() + CAUSE_WAIT_S
        without_neighbour = {rank}
        while fault.kind == NeighbourLost.__name__:
            event = self._group.receive(max(0.0, deadline - time.monotonic()))
            if event is None:
                break
            if isinstance(event, StageEnded):
                if event.rank not in without_neighbour:
                    return event.as_error()
            elif isinstance(event, StageMessage) and isinstance(event.message, Fault):
                rank, fault = event.rank, event.message
                without_neighbour.add(rank)
        if fault.kind == NeighbourLost.__name__ and (silent := self._silent_stage(without_neighbour)) is not None:
            return StageSilent(
                f"stage {silent} on {self._group.host(silent)} has not answered for "
                f"{self._group.silence_s(silent):.0f} s, "
                f"and stage {rank} on {self._group.host(rank)} lost a neighbour: {fault.message}",
                silent,
            )
        kind = NotFinite if fault.kind == NotFinite.__name__ else StageFault
        return kind(f"stage {rank} on {self._group.host(rank)}: {fault.message}", rank)

    def _silent_stage(self, without_neighbour: Collection[int]) -> int | None:
        """Return the rank not in ``without_neighbour`` whose guard is silent longest; None if none is for SILENT_S."""
        others = [rank for rank in range(self._group.size) if rank not in without_neighbour]
        silent = [rank for rank in others if self._group.silence_s(rank) >= SILENT_S]
        return max(silent, key=self._group.silence_s, default=None)

    def _check_for_pause(self) -> None:
        """Postpone reports of stuck stages if this process was suspended since the last check."""
        now = time.monotonic()
        if now - self._checked_at > CHECK_INTERVAL_S + PAUSE_S:
            self._reports_from = now + PAUSE_S
            self._late_hops.clear()
        self._checked_at = now

    def describe(self, rank: int) -> str:
        """Return a description of a stage, its host, its phase, and for how long the phase has lasted."""
        status = self._group.status(rank)
        phase_s = status.for_s + self._group.silence_s(rank)
        return f"stage {rank} on {self._group.host(rank)} ({status.update} for {phase_s:.0f} s)"

    def describe_all(self) -> tuple[str, ...]:
        """Return ``describe`` of every stage, by rank."""
        return tuple(self.describe(rank) for rank in range(self._group.size))

    def _raise_if_stuck(self, now: float) -> None:
        """Raise StageSilent if a stage is stopped or does not answer, or if a hop is stuck."""
        statuses = [self._group.status(rank) for rank in range(self._group.size)]
        for rank, status in enumerate(statuses):
            if self._group.has_started(rank) and self._group.silence_s(rank) > self._stall_timeout_s + HEARTBEAT_S:
                raise StageSilent(
                    f"{self.describe(rank)} does not answer: its host is off, asleep or unreachable", rank
                )
            if status.stopped_s > self._stall_timeout_s:
                raise StageSilent(
                    f"{self.describe(rank)} is stopped: its process was suspended {status.stopped_s:.0f} s ago", rank
                )
        for rank in range(1, len(statuses)):
            if statuses[rank].stopped_s:
                continue  # a suspended stage receives nothing; its own check above reports it
            if self._hop_waits_s(rank, statuses[rank - 1], statuses[rank], now) > self._stall_timeout_s:
                raise StageSilent(
                    f"{self.describe(rank)} does not receive what {self.describe(rank - 1)} has sent: "
                    "the hop between them is stuck; check the cable and the addresses in the hostfile",
                    rank,
                )

    def _hop_waits_s(self, rank: int, before: StageStatus, status: StageStatus, now: float) -> float:
        """Return the seconds for which a stage has waited for what the stage before it has sent; 0 if it does not."""
        step, step_before = status.update.step, before.update.step
        is_late = False
        if status.update.phase is Phase.RECEIVING and step is not None and step_before is not None:
            is_late = step_before > step or (step_before == step and before.update.phase is Phase.IDLE)
        if not is_late:
            self._late_hops.pop(rank, None)
            return 0.0
        if rank not in self._late_hops or self._late_hops[rank][0] != step:
            self._late_hops[rank] = step, now
        return now - self._late_hops[rank][1]
