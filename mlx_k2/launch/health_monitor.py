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

LOOK_S = 0.5
GAP_S = 2.0
"""If a wait takes this much longer than it should, this process was stopped or its machine slept."""
CAUSE_S = 2.0
"""Wait this long for the end of another stage after a stage reported a lost neighbour: that end is the cause."""
SILENT_S = 3.0
"""A guard that was silent for this long when a neighbour of its stage reports a lost hop is the cause."""


class HealthMonitor:
    """The monitor of one group.

    The group's ``stall_timeout_s`` limits how long a stage may be stopped, a guard silent or a hop stuck.
    """

    def __init__(self, group: StageGroup) -> None:
        self._group = group
        self._stall_timeout_s = group.stall_timeout_s
        self._hops: dict[int, tuple[int, float]] = {}
        """For each rank that waits for a step which the stage before has sent: the step, and since when it waits."""
        self._looked_at = self._reports_from = time.monotonic()

    def receive(self, deadline: float, wake_at: float = math.inf) -> StageMessage | Woken | None:
        """Return the next message of any stage; None when none came before ``deadline`` (monotonic seconds).

        Queued messages are returned before any stage is reported. After this process was stopped or its machine slept,
        the guards first get GAP_S to answer. Woken is returned at ``wake_at``, and after ``StageGroup.wake``.

        Raises:
            Cancelled: the group's ``cancelled`` is set.
            StageStartError, StageFault: a stage ended, or reported a fault.
            StageSilent: a stage is stopped, its guard is silent, or a hop is stuck; names it, its host and its step.
        """
        while True:
            if self._group.cancelled.is_set():
                raise Cancelled("the start was cancelled")
            self._check_gap()
            until = min(max(deadline, self._reports_from), wake_at)
            event = self._group.receive(max(0.0, min(LOOK_S, until - time.monotonic())))
            if isinstance(event, Woken):
                return event
            if isinstance(event, StageEnded):
                raise event.as_error()
            if event is not None:
                if isinstance(event.message, Fault):
                    raise self._cause(event.rank, event.message)
                return event
            self._check_gap()
            now = time.monotonic()
            if now >= self._reports_from:
                self._raise_if_stuck(now)
                if now >= deadline:
                    return None
            if now >= wake_at:
                return Woken()

    def _cause(self, rank: int, fault: Fault) -> ClusterError:
        """Return the error for a fault. A stage that lost its neighbour is not the cause if another stage is."""
        deadline = time.monotonic() + CAUSE_S
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
            hosts = self._group.host(silent), self._group.host(rank)
            silence_s = self._group.silence_s(silent)
            return StageSilent(
                f"stage {silent} on {hosts[0]} has not answered for {silence_s:.0f} s, "
                f"and stage {rank} on {hosts[1]} lost a neighbour: {fault.message}",
                silent,
            )
        kind = NotFinite if fault.kind == NotFinite.__name__ else StageFault
        return kind(f"stage {rank} on {self._group.host(rank)}: {fault.message}", rank)

    def _silent_stage(self, without_neighbour: Collection[int]) -> int | None:
        """Return the rank outside ``without_neighbour`` whose guard is silent longest; None if below SILENT_S."""
        others = [rank for rank in range(self._group.size) if rank not in without_neighbour]
        rank = max(others, key=self._group.silence_s, default=None)
        return None if rank is None or self._group.silence_s(rank) < SILENT_S else rank

    def _check_gap(self) -> None:
        now = time.monotonic()
        if now - self._looked_at > LOOK_S + GAP_S:
            self._reports_from = now + GAP_S
            self._hops.clear()
        self._looked_at = now

    def describe(self, rank: int) -> str:
        """Return a description of a stage, its host, its phase, and for how long the phase has lasted."""
        status = self._group.status(rank)
        since_s = status.for_s + self._group.silence_s(rank)
        return f"stage {rank} on {self._group.host(rank)} ({status.update} for {since_s:.0f} s)"

    def describe_all(self) -> tuple[str, ...]:
        """Return ``describe`` of every stage, by rank."""
        return tuple(self.describe(rank) for rank in range(self._group.size))

    def _raise_if_stuck(self, now: float) -> None:
        """Raise StageSilent for a stage that is stopped or does not answer, and for a hop that is stuck."""
        statuses = [self._group.status(rank) for rank in range(self._group.size)]
        for rank, status in enumerate(statuses):
            if self._group.has_come_up(rank) and self._group.silence_s(rank) > self._stall_timeout_s + HEARTBEAT_S:
                raise StageSilent(
                    f"{self.describe(rank)} does not answer: its host is off, asleep or unreachable", rank
                )
            if status.stopped_s > self._stall_timeout_s:
                raise StageSilent(
                    f"{self.describe(rank)} is stopped: its process was suspended {status.stopped_s:.0f} s ago", rank
                )
        for rank in range(1, len(statuses)):
            if statuses[rank].stopped_s:
                continue  # its stop explains the wait, and has not reached the stall timeout yet
            if self._hop_waits_s(rank, statuses[rank - 1], statuses[rank], now) > self._stall_timeout_s:
                raise StageSilent(
                    f"{self.describe(rank)} does not receive what {self.describe(rank - 1)} has sent: "
                    "the hop between them is stuck; check the cable and the addresses in the hostfile",
                    rank,
                )

    def _hop_waits_s(self, rank: int, before: StageStatus, status: StageStatus, now: float) -> float:
        """Return for how long a stage has waited for hidden states that the stage before it has sent, else 0."""
        step, sent = status.update.step, before.update.step
        is_waiting = status.update.phase is Phase.RECEIVING and step is not None and sent is not None and sent >= step
        if not is_waiting or step is None or (sent == step and before.update.phase is not Phase.IDLE):
            self._hops.pop(rank, None)
            return 0.0
        if self._hops.get(rank, (None, now))[0] != step:
            self._hops[rank] = step, now
        return now - self._hops[rank][1]
