"""Stages that sleep instead of computing, one thread each, to run the scheduler without the cost of arithmetic."""

import queue
import threading
import time
from dataclasses import dataclass, field

from mlx_k2.protocol.messages import StepDone, encode_message
from mlx_k2.sampling import SampledToken
from mlx_k2.scheduling.cost_model import StageSizes, StageSpeed
from mlx_k2.scheduling.microbatch import Microbatch

STEP_S = 0.02
SIZES = StageSizes(
    dense_bytes=1_000_000,
    head_bytes=0,
    expert_bytes=0,
    num_experts=0,
    experts_per_token=0,
    key_bytes=0,
    operations_per_token=0,
    operations_per_pair=0,
    operations_per_sampled_token=0,
    absorbed_operations=0,
    naive_operations=0,
    rebuild_operations=0,
)
SPEED = StageSpeed(fixed_s=0.0, bytes_per_s=SIZES.dense_bytes / STEP_S, operations_per_s=1.0)
"""With this speed every step takes STEP_S, independent of its rows."""


@dataclass
class SleepingStages:
    """Stages that only sleep, one thread each. The last one puts encoded StepDone messages into ``done``."""

    num_stages: int
    done: "queue.SimpleQueue[bytes]" = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self._inbox: queue.SimpleQueue[Microbatch | None] = queue.SimpleQueue()
        before = self._inbox
        for rank in range(self.num_stages):
            after: queue.SimpleQueue[Microbatch | None] = queue.SimpleQueue()
            is_last = rank == self.num_stages - 1
            threading.Thread(target=self._work, args=(before, after, is_last), daemon=True).start()
            before = after

    def send(self, microbatch: Microbatch) -> None:
        """Queue ``microbatch`` for the first stage."""
        self._inbox.put(microbatch)

    def stop(self) -> None:
        """End all threads."""
        self._inbox.put(None)

    def _work(
        self, before: "queue.SimpleQueue[Microbatch | None]", after: "queue.SimpleQueue[Microbatch | None]", last: bool
    ) -> None:
        while (microbatch := before.get()) is not None:
            time.sleep(STEP_S)
            if last:
                tokens = tuple(SampledToken(1) for planned in microbatch.rows if planned.row.needs_logits)
                self.done.put(encode_message(StepDone(microbatch.number, STEP_S, tokens=tokens)))
            else:
                after.put(microbatch)
        after.put(None)
