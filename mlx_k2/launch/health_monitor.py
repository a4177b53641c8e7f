"""Waits for what the stages say, and meanwhile sees whether one has stopped, fallen silent or waits for a lost hop.

Knows where stages stand; no plan, and no deadline but its caller's.
"""

import time
from dataclasses import dataclass

from mlx_k2.errors import StageSilent
from mlx_k2.launch.group import HEARTBEAT_S, StageGroup
from mlx_k2.launch.stage_events import StageEvent
from mlx_k2.protocol.stage_status import Phase, StageStatus

LOOK_S = 0.5
GAP_S = 2.0
"""A wait that took so much longer than it should: this process was stopped, or its machine slept."""


@dataclass(frozen=True)
class _WaitingHop:
    """Stage ``rank`` waits for hidden states of ``step``, which the stage before has sent; seen first at ``since``."""

    rank: int
    step: int
    since: float


class HealthMonitor:
    """Over one group, whose ``stall_timeout_s`` is how long a stop, a silence or a waiting hop may last."""

    def __init__(self, group: StageGroup) -> None:
        self._group = group
        self._stall_timeout_s = group.stall_timeout_s
        self._hops: dict[int, _WaitingHop] = {}
        self._looked_at = self._judge_from = time.monotonic()

    def receive(self, deadline: float) -> StageEvent | None:
        """The next thing that a stage said, or its end; None when nothing came before ``deadline`` (monotonic).

        What waits to be read is read before anything is judged; after a gap in this process's own time the guards
        have time to answer first.

        Raises:
            StageSilent: a stage is stopped, its guard is silent, or a hop is stuck; names it, its host and its step.
        """
        while True:
            self._check_gap()
            until = max(deadline, self._judge_from)
            event = self._group.receive(max(0.0, min(LOOK_S, until - time.monotonic())))
            if event is not None:
                return event
            self._check_gap()
            now = time.monotonic()
            if now >= self._judge_from:
                if (trouble := self._trouble(now)) is not None:
                    raise StageSilent(trouble)
                if now >= deadline:
                    return None

    def _check_gap(self) -> None:
        now = time.monotonic()
        if now - self._looked_at > LOOK_S + GAP_S:
            self._judge_from = now + GAP_S
            self._hops.clear()
        self._looked_at = now

    def describe(self, rank: int) -> str:
        """A stage, its host, and where it stands since when."""
        status = self._group.status(rank)
        since_s = status.for_s + self._group.silence_s(rank)
        return f"stage {rank} on {self._group.host(rank)} ({status.update} for {since_s:.0f} s)"

    def describe_all(self) -> tuple[str, ...]:
        """Every stage, as ``describe`` says it."""
        return tuple(self.describe(rank) for rank in range(self._group.size))

    def _trouble(self, now: float) -> str | None:
        statuses = [self._group.status(rank) for rank in range(self._group.size)]
        for rank, status in enumerate(statuses):
            if self._group.has_come_up(rank) and self._group.silence_s(rank) > self._stall_timeout_s + HEARTBEAT_S:
                return f"{self.describe(rank)} cannot be heard: its host is off, asleep or unreachable"
            if status.stopped_s > self._stall_timeout_s:
                return f"{self.describe(rank)} is stopped: its process was suspended {status.stopped_s:.0f} s ago"
        for rank in range(1, len(statuses)):
            if statuses[rank].stopped_s:
                continue  # that is why it waits; its own patience is not over yet
            if self._hop_waits_s(rank, statuses[rank - 1], statuses[rank], now) > self._stall_timeout_s:
                return (
                    f"{self.describe(rank)} does not get what {self.describe(rank - 1)} has sent: "
                    "the hop between them is stuck, see to the cable and the addresses in the hostfile"
                )
        return None

    def _hop_waits_s(self, rank: int, before: StageStatus, status: StageStatus, now: float) -> float:
        """Since when a stage waits for what the stage before it has sent already."""
        step = status.update.step
        waits = status.update.phase is Phase.RECEIVING and step is not None and _has_sent(before, step)
        if not waits or step is None:
            self._hops.pop(rank, None)
            return 0.0
        if rank not in self._hops or self._hops[rank].step != step:
            self._hops[rank] = _WaitingHop(rank, step, now)
        return now - self._hops[rank].since


def _has_sent(status: StageStatus, step: int) -> bool:
    update = status.update
    if update.step is None:
        return False
    return update.step > step or (update.step == step and update.phase is Phase.IDLE)
