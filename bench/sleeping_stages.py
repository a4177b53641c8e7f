"""Comparison of the scheduler with an ideal one, on stages that sleep, so that the CPU is not a bottleneck.

python -m bench.sleeping_stages [--save] [--pairs N] [--only WORDS]

Each stage is a thread that waits for a plan from the stage before it, sleeps for STEP_S and passes the plan on. The
scheduler, its step policy and the messages as bytes are the program's own. With an ideal scheduler no stage would wait.
"""

import time
from functools import partial

from bench.claims import Claim, measure, read_options
from mlx_k2.protocol.messages import StepDone, decode_from_stage
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.cost_model import StageCost
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.step_policy import StepPolicy
from mlx_k2.testing.sleeping_stages import SIZES, SPEED, STEP_S, SleepingStages

NUM_TOKENS = 100


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    options = read_options(__doc__)
    for num_stages in (2, 3):
        for num_streams in (num_stages, 8):
            name = f"{num_streams} streams on {num_stages} sleeping stages, over stages that never wait"
            claim = Claim(name, partial(steps_per_s, num_stages, num_streams), ideal_steps_per_s, 0.95)
            measure("sleeping_stages", claim, options)


def ideal_steps_per_s() -> float:
    """Return the steps per second of a last stage that never waits."""
    return 1 / STEP_S


def steps_per_s(num_stages: int, num_streams: int) -> float:
    """Return the steps per second while the pipeline is full: the first and last 2 steps per stage are left out."""
    stages = SleepingStages(num_stages)
    policy = StepPolicy([StageCost(SIZES, SPEED)] * num_stages)
    limits = SchedulerLimits(num_streams, context_tokens=NUM_TOKENS + 8, chunk_tokens=8, num_stages=num_stages)
    scheduler = Scheduler(limits, policy)
    for index in range(num_streams):
        scheduler.submit(Request((index,), NUM_TOKENS, Sampling(seed=0), frozenset()))
    arrivals = []
    while scheduler.has_work:
        while (microbatch := scheduler.next_microbatch()) is not None:
            stages.send(microbatch)
        done = decode_from_stage(stages.done.get(timeout=10))
        assert isinstance(done, StepDone)
        scheduler.complete(done.number, done.tokens)
        arrivals.append(time.perf_counter())
    stages.stop()
    counted = arrivals[2 * num_stages : -2 * num_stages]
    return (len(counted) - 1) / (counted[-1] - counted[0])


if __name__ == "__main__":
    main()
