"""How close the scheduler comes to the ideal when stages sleep instead of computing: no processor is short.

python -m bench.sleeping_stages [--save] [--pairs N] [--only WORDS]

Threads stand for the stages: each takes a plan from its inbox, waits for the hop before it, sleeps for the step's time
and passes it on. The coordinator's part is the real one: the scheduler, its pace, and the messages as bytes. The ideal
is that of stages that never wait.
"""

import queue
import threading
import time
from dataclasses import dataclass, field
from functools import partial

from bench.claims import Claim, measure, read_options
from mlx_k2.protocol.messages import StepDone, decode_from_stage, encode_message
from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.cost_model import StageCost, StageSizes, StageSpeed
from mlx_k2.scheduling.microbatch import Microbatch
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.step_policy import MeasuredPace

STEP_S = 0.02
TOKENS = 100
SIZES = StageSizes(
    dense_bytes=1_000_000,
    head_bytes=0,
    expert_bytes=0,
    num_experts=0,
    experts_per_token=0,
    key_bytes=0,
    operations_per_token=0,
    operations_per_draw=0,
    absorbed_operations=0,
    naive_operations=0,
    rebuild_operations=0,
)
SPEED = StageSpeed(fixed_s=0.0, bytes_per_s=SIZES.dense_bytes / STEP_S, operations_per_s=1.0)
"""A step takes STEP_S, whatever is in it."""


@dataclass
class SleepingStages:
    """Stages that only sleep, one thread each; what the last one has done arrives in ``done``."""

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
        """Let the first stage begin as soon as it can."""
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
                tokens = tuple(SampledToken(1) for row in microbatch.rows if row.draws_token)
                self.done.put(encode_message(StepDone(microbatch.number, STEP_S, tokens=tokens)))
            else:
                after.put(microbatch)
        after.put(None)


def main() -> None:
    """Measure, print, and with --save keep the rows."""
    options = read_options(__doc__)
    for num_stages in (2, 3):
        for num_streams in (num_stages, 8):
            name = f"{num_streams} streams on {num_stages} sleeping stages, over stages that never wait"
            measure("sleeping_stages", Claim(name, partial(steps_per_s, num_stages, num_streams), ideal, 0.95), options)


def ideal() -> float:
    """Steps a second of a last stage that never waits."""
    return 1 / STEP_S


def steps_per_s(num_stages: int, num_streams: int) -> float:
    """Steps a second, from when the pipeline is full until it begins to empty."""
    stages = SleepingStages(num_stages)
    pace = MeasuredPace([StageCost(SIZES, SPEED)] * num_stages)
    limits = SchedulerLimits(num_streams, TOKENS + 8, 8, num_stages)
    scheduler = Scheduler(limits, pace)
    for index in range(num_streams):
        scheduler.submit(Request((index,), TOKENS, Sampling(seed=0), frozenset()))
    arrivals = []
    while scheduler.has_work:
        while (microbatch := scheduler.next_microbatch()) is not None:
            stages.send(microbatch)
        done = decode_from_stage(stages.done.get(timeout=10))
        assert isinstance(done, StepDone)
        scheduler.complete(done.number, [token.token_id for token in done.tokens])
        arrivals.append(time.perf_counter())
    stages.stop()
    filled = arrivals[2 * num_stages : -2 * num_stages]
    return (len(filled) - 1) / (filled[-1] - filled[0])


if __name__ == "__main__":
    main()
