"""Cost of scheduling a step in the coordinator, by number of running sequences and by context length.

python -m bench.scheduler_cost [--save]

No stage runs: each step is answered at once with fixed tokens. The sizes of the layers are Kimi K2's. The cost is the
time of planning the step, encoding its message, learning from the stages' times and processing the tokens, in
microseconds. --save appends the rows to bench/results/scheduler_cost.csv.
"""

import argparse
import json
import statistics
import time

from bench.measure import save_rows
from mlx_k2.config import ModelConfig
from mlx_k2.deployment.stage_costs import GPU_SPEED, stage_sizes
from mlx_k2.protocol.messages import Step, encode_message
from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.cost_model import StageCost
from mlx_k2.scheduling.microbatch import Microbatch
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.step_policy import StepPolicy
from mlx_k2.weights.known_layout import thinking_config_fields

NUM_STEPS = 300
MAX_CONTEXT = 131072
FAKE_STAGE_S = 0.05
"""Reported as the time of each step in each stage."""
BY_SEQUENCES = [(num_sequences, 1024) for num_sequences in (1, 2, 4, 8, 16, 32, 64)]
BY_CONTEXT = [(8, context) for context in (4096, 16384, 65536)]


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/scheduler_cost.csv")
    save = parser.parse_args().save
    rows = []
    for num_sequences, context in BY_SEQUENCES + BY_CONTEXT:
        cost_us = 1e6 * step_cost_s(num_sequences, context)
        print(f"{num_sequences} sequences of {context} tokens: {cost_us:.0f} us a step")
        rows.append((num_sequences, context, f"{cost_us:.1f}"))
    if save:
        print("saved to", save_rows("scheduler_cost", ("sequences", "context", "us_a_step"), rows))


def step_cost_s(num_sequences: int, context: int) -> float:
    """Return the median seconds per step, over NUM_STEPS decode steps."""
    config = ModelConfig.from_json(json.dumps(thinking_config_fields()).encode(), "Kimi K2 Thinking")
    stages = (stage_sizes(config, 0, 32, compute_bytes=2), stage_sizes(config, 32, 61, compute_bytes=2))
    policy = StepPolicy([StageCost(sizes, GPU_SPEED) for sizes in stages])
    limits = SchedulerLimits(num_sequences, MAX_CONTEXT, chunk_tokens=2048, num_stages=2, prompts_first=True)
    scheduler = Scheduler(limits, policy)
    for index in range(num_sequences):
        scheduler.submit(Request((index, *range(context)), 2 * NUM_STEPS, Sampling(seed=0), frozenset()))
    times_s: list[float] = []
    in_flight: list[Microbatch] = []
    while len(times_s) < NUM_STEPS:
        started_at = time.perf_counter()
        while (microbatch := scheduler.next_microbatch()) is not None:
            encode_message(Step(microbatch.number, tuple(planned.row for planned in microbatch.rows)))
            in_flight.append(microbatch)
        done = in_flight.pop(0)
        for rank in (0, 1):
            policy.observe(rank, done.load, FAKE_STAGE_S)
        scheduler.complete(done.number, [SampledToken(1) for planned in done.rows if planned.row.needs_logits])
        if done.decodes:
            times_s.append(time.perf_counter() - started_at)
    return statistics.median(times_s)


if __name__ == "__main__":
    main()
