"""Report of a finished step of one stage, for logs and benchmarks."""

from dataclasses import dataclass

from mlx_k2.protocol.messages import StepDone
from mlx_k2.scheduling.microbatch import Microbatch


@dataclass(frozen=True)
class StageReport:
    """A step that stage ``rank`` has finished: its StepDone, and the time of arrival (time.monotonic)."""

    rank: int
    microbatch: Microbatch
    done: StepDone
    received_at: float
