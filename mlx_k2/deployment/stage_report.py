"""A finished step of one stage, for logs and benchmarks."""

from dataclasses import dataclass

from mlx_k2.protocol.messages import StepDone
from mlx_k2.scheduling.microbatch import Microbatch


@dataclass(frozen=True)
class StageReport:
    """A stage has finished a step: what it said of it, and when that was heard (time.monotonic)."""

    rank: int
    microbatch: Microbatch
    done: StepDone
    heard_at: float
