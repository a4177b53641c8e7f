"""Cluster activity: what the stages load, compute and send, and a history of one hour. Knows no request and no HTTP."""

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_k2.deployment.deploy import Deployment
from mlx_k2.deployment.listener import StageReport
from mlx_k2.deployment.plan import DTYPE_BYTES, StagePlan
from mlx_k2.deployment.restarting import OnRestart, RestartingDeployment
from mlx_k2.errors import ClusterError
from mlx_k2.launch.group import StageGroup
from mlx_k2.protocol.messages import FromStage, LayerLoaded

INTERVAL_S = 10
"""Seconds of one entry of the history."""
NUM_INTERVALS = 360


@dataclass
class _StageWork:
    """The work of one stage: seconds of computing, seconds of waiting for hidden states, and computed tokens."""

    busy_s: float = 0.0
    waiting_s: float = 0.0
    num_tokens: int = 0


@dataclass
class _Interval:
    """The work of the stages and the tokens of all answers in the INTERVAL_S from ``number`` * INTERVAL_S on."""

    number: int
    stages: list[_StageWork]
    answer_tokens: int = 0


class ClusterActivity:
    """The activity of one deployment's stages. Safe to use on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._intervals: deque[_Interval] = deque(maxlen=NUM_INTERVALS)
        self._started_at = time.monotonic()
        self._hop_bytes = 0
        self.plans: Sequence[StagePlan] = ()
        """The plans of the stages; () before they are known."""
        self.loaded_bytes: Counter[int] = Counter()
        """The bytes of weights that each stage has loaded, by rank; empty while the stages restart."""
        self.phase = ""
        """The phase of a start or a restart, for /v1/status."""
        self.faults: Counter[int | None] = Counter()
        """The number of faults by the rank that caused them, None where it is unknown."""
        self.num_restarts = 0
        """The number of successful restarts of all stages."""

    def progress(self, rank: int, message: FromStage) -> None:
        """Record what a stage has loaded."""
        if isinstance(message, LayerLoaded):
            self.loaded_bytes[rank] += message.held_bytes

    def deployed(self, deployment: Deployment) -> None:
        """Record the size of a hop's hidden states, when the stages are ready."""
        self._hop_bytes = deployment.model.config.hidden_size * DTYPE_BYTES[deployment.shape.dtype]

    def add_report(self, report: StageReport) -> None:
        """Record a step that a stage has finished."""
        with self._lock:
            work = self._interval().stages[report.rank]
            work.busy_s += report.done.busy_s
            work.waiting_s += report.done.receive_s
            work.num_tokens += report.microbatch.num_tokens

    def add_token(self) -> None:
        """Record a token of an answer."""
        with self._lock:
            self._interval().answer_tokens += 1

    def stages(self) -> list[dict[str, Any]]:
        """Return the fields of each stage for /v1/status. Fractions and rates cover the last 10 to 20 s."""
        with self._lock:
            now = time.monotonic()
            recent = [interval for interval in self._intervals if interval.number >= self._number(now) - 1]
            seconds = min(now - self._started_at, INTERVAL_S + now % INTERVAL_S)
        return [
            {
                "host": plan.host.ssh,
                "first_layer": plan.assignment.first_layer,
                "last_layer": plan.assignment.end_layer - 1,
                "shard_bytes": plan.shard_bytes,
                "loaded_bytes": self.loaded_bytes[rank],
                "busy_fraction": _fraction(sum(interval.stages[rank].busy_s for interval in recent), seconds),
                "waiting_fraction": _fraction(sum(interval.stages[rank].waiting_s for interval in recent), seconds),
                "sent_bytes_per_s": round(
                    sum(interval.stages[rank].num_tokens for interval in recent) * self._hop_bytes / max(1.0, seconds)
                    if rank + 1 < len(self.plans)
                    else 0
                ),
                "faults": self.faults[rank],
            }
            for rank, plan in enumerate(self.plans)
        ]

    def history(self) -> list[dict[str, Any]]:
        """Return the fields of the last hour's intervals for /v1/status, oldest first, without those with no activity.

        ``seconds_ago`` is the age of an interval's beginning.
        """
        with self._lock:
            now = time.monotonic()
            return [
                {
                    "seconds_ago": round(now - interval.number * INTERVAL_S),
                    "tokens": interval.answer_tokens,
                    "computed_tokens": interval.stages[0].num_tokens,
                    "busy_fractions": [_fraction(work.busy_s, INTERVAL_S) for work in interval.stages],
                }
                for interval in self._intervals
                if interval.number > self._number(now) - NUM_INTERVALS
            ]

    def _interval(self) -> _Interval:
        """Return the current interval."""
        number = self._number(time.monotonic())
        if not self._intervals or self._intervals[-1].number != number:
            self._intervals.append(_Interval(number, [_StageWork() for _ in self.plans]))
        return self._intervals[-1]

    @staticmethod
    def _number(now: float) -> int:
        return int(now // INTERVAL_S)


@dataclass(frozen=True)
class CountedRestarts:
    """The restarts of a deployment, with a count of faults and restarts in ``activity``."""

    activity: ClusterActivity
    restarting: RestartingDeployment

    def restart(self, error: ClusterError, on_restart: OnRestart) -> StageGroup:
        """Restart all stages. Raise what RestartingDeployment.restart raises."""
        self.activity.faults[error.rank] += 1
        loaded_bytes, self.activity.loaded_bytes = self.activity.loaded_bytes, Counter()
        group = self.restarting.restart(error, on_restart)
        self.activity.loaded_bytes = loaded_bytes  # each stage has the same layers again
        self.activity.num_restarts += 1
        return group

    def cancel(self) -> None:
        """Cancel a restart that is in progress."""
        self.restarting.cancel()


def _fraction(part_s: float, seconds: float) -> float:
    """Return ``part_s`` as a fraction of ``seconds``, at most 1: a long step counts only in the interval of its end."""
    return round(min(1.0, part_s / max(1.0, seconds)), 3)
