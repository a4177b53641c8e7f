"""Cost of the coordinator's decisions per step, by number of running sequences and by context length.

python -m bench.scheduler_cost [--save]

Stages answer at once and compute nothing; the sizes are Kimi K2's. The cost is in microseconds per step: planning the
step, encoding its message and processing its tokens. --save appends the rows to results/scheduler_cost.csv.
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

STEPS = 300
CONTEXT_TOKENS = 131072
CASES = [(sequences, 1024) for sequences in (1, 2, 4, 8, 16, 32, 64)] + [
    (8, context) for context in (4096, 16384, 65536)
]


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/scheduler_cost.csv")
    save = parser.parse_args().save
    rows = []
    for sequences, context in CASES:
        cost_us = 1e6 * step_cost_s(sequences, context)
        print(f"{sequences} sequences of {context} tokens: {cost_us:.0f} us a step")
        rows.append((sequences, context, f"{cost_us:.1f}"))
    if save:
        print("saved to", save_rows("scheduler_cost", ("sequences", "context", "us_a_step"), rows))


def step_cost_s(num_sequences: int, context: int) -> float:
    """Return the median seconds per step, over STEPS decoding steps."""
    config = ModelConfig.from_json(json.dumps(thinking_config_fields()).encode(), "Kimi K2 Thinking")
    policy = StepPolicy([StageCost(stage_sizes(config, *layers, 2), GPU_SPEED) for layers in ((0, 32), (32, 61))])
    scheduler = Scheduler(SchedulerLimits(num_sequences, CONTEXT_TOKENS, 2048, 2, prompts_first=True), policy)
    for index in range(num_sequences):
        scheduler.submit(Request((index, *range(context)), 2 * STEPS, Sampling(seed=0), frozenset()))
    times: list[float] = []
    in_flight: list[Microbatch] = []
    while len(times) < STEPS:
        began = time.perf_counter()
        while (microbatch := scheduler.next_microbatch()) is not None:
            encode_message(Step(microbatch.number, tuple(planned.row for planned in microbatch.rows)))
            in_flight.append(microbatch)
        done = in_flight.pop(0)
        for rank in (0, 1):
            policy.observe(rank, done.load, 0.05)
        scheduler.complete(done.number, [SampledToken(1) for planned in done.rows if planned.row.needs_logits])
        if done.decodes:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
