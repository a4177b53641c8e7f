"""Cost of the check for NaN and infinity in each step, compared with the time of the step. All in one process.

python -m bench.finite_check [--save LABEL]

The check is timed alone: it sums values that are already evaluated, and reads the sum. It is compared with these steps:

- a decode step of one sequence on each of two stages of the checkpoint "even";
- a chunk of a prompt on the last stage, which samples nothing and checks the chunk's rows of its last layer's cache;
- the logits and one sampled token of a head with Kimi K2's 163,840 tokens, but hidden size 1024: less work than K2's.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
from msgspec.structs import replace

from bench.checkpoints import bench_checkpoint
from bench.measure import prompt_ids, save_rows
from mlx_k2.model.batch import Batch, Span
from mlx_k2.model.sampler import SamplingRequest, sample_tokens
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.weights.reader import is_finite
from tests.model.checkpoints import read_config
from tests.stage.pipeline import Pipeline

NUM_CHECKS = 1000
NUM_STEPS = 40
NUM_CHUNKS = 5
"""Repetitions of each check, decode step and prompt chunk."""
PROMPT_TOKENS = 64
VOCAB_SIZE, HIDDEN_SIZE = 163_840, 1024
SAMPLING = Sampling(seed=1, temperature=0.6)


class StageTimes(NamedTuple):
    """Median times of the check and of a step of one stage, in microseconds."""

    stage: str
    check_us: float
    step_us: float


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", metavar="LABEL", help="append to results/finite_check.csv under this label")
    options = parser.parse_args()
    mx.disable_compile()  # as a stage does on a CPU
    results = [*measure_stages(), measure_large_head()]
    for stage, check_us, step_us in results:
        print(f"{stage:24} check {check_us:8.1f} us  step {step_us:10.1f} us  {check_us / step_us:.3%}")
    if options.save:
        header = ("label", "stage", "check_us", "step_us", "ratio")
        rows = [
            (options.save, stage, f"{check_us:.1f}", f"{step_us:.1f}", f"{check_us / step_us:.5f}")
            for stage, check_us, step_us in results
        ]
        sys.stderr.write(f"{save_rows('finite_check', header, rows)}\n")


def measure_stages() -> list[StageTimes]:
    """Return the times of a decode step on each stage of "even", and of a prompt's chunk on the last stage."""
    folder = bench_checkpoint("even")
    pipeline = Pipeline(folder, 2)
    config = read_config(folder)
    prompt = Row(slot=0, position=0, token_ids=tuple(prompt_ids(PROMPT_TOKENS)), is_prompt=True, sampling=None)
    decode = Row(slot=0, position=PROMPT_TOKENS, token_ids=(7,), is_prompt=False, sampling=SAMPLING, recent_ids=(7,))
    chunks = [pipeline.step(prompt) for _ in range(NUM_CHUNKS)]
    decodes = [pipeline.step(replace(decode, position=PROMPT_TOKENS + step)) for step in range(NUM_STEPS)]
    hidden_state, logits = mx.random.normal((1, config.hidden_size)), mx.random.normal((1, config.vocab_size))
    model, batch = pipeline.runners[1]._model, Batch([Span(0, 0, PROMPT_TOKENS, is_prompt=True)])
    return [
        StageTimes(name, median_us(check, NUM_CHECKS), 1e6 * statistics.median(step[rank].busy_s for step in steps))
        for name, check, rank, steps in (
            ("even, stage 0", check_of(hidden_state), 0, decodes),
            ("even, stage 1", check_of(logits), 1, decodes),
            ("even, stage 1, prompt", lambda: is_finite(model.cache_total(batch)), 1, chunks),
        )
    ]


def measure_large_head() -> StageTimes:
    """Return the times of a head with VOCAB_SIZE tokens: of its logits and of sampling, without any layer."""
    projection, hidden = mx.random.normal((HIDDEN_SIZE, VOCAB_SIZE)), mx.random.normal((1, HIDDEN_SIZE))
    mx.eval(projection, hidden)

    def step() -> None:
        sample_tokens(hidden @ projection, [SamplingRequest(SAMPLING, 1, (7,))])

    check_us = median_us(check_of(hidden @ projection), NUM_CHECKS)
    return StageTimes("head of 163,840 tokens", check_us, median_us(step, NUM_STEPS))


def check_of(values: mx.array) -> Callable[[], object]:
    """Evaluate ``values``, and return a function that checks them."""
    mx.eval(values)
    return lambda: is_finite(mx.sum(values))


def median_us(function: Callable[[], object], count: int) -> float:
    """Return the median time of ``count`` calls in microseconds."""
    times_s = []
    for _ in range(count):
        started_at = time.perf_counter()
        function()
        times_s.append(time.perf_counter() - started_at)
    return statistics.median(times_s) * 1e6


if __name__ == "__main__":
    main()
