"""Cost of the search for NaN and infinity in each step, compared with the time of a step. Runs in one process.

The check is timed alone: the sum of values that are evaluated already, and the read of its result. The steps are decode
steps of one sequence on each of two stages of the checkpoint "even"; a chunk of a prompt on the last stage, which
samples nothing and sums its last layer's rows of the cache; and the logits and one sampled token of a head with Kimi
K2's 163,840 tokens at hidden size 1024, which computes less for each token than Kimi K2's own.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import mlx.core as mx

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
PROMPT_TOKENS = 64
VOCAB_SIZE, HIDDEN = 163_840, 1024
SAMPLING = Sampling(seed=1, temperature=0.6)


def main() -> None:
    """Measure and print the table; with --save append its rows to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", metavar="LABEL", help="append to results/finite_check.csv under this label")
    options = parser.parse_args()
    mx.disable_compile()
    rows = [*even(), head()]
    for name, check_us, step_us in rows:
        print(f"{name:24} check {check_us:8.1f} us  step {step_us:10.1f} us  {100 * check_us / step_us:.3f}%")
    if options.save:
        table = [
            (options.save, name, f"{check:.1f}", f"{step:.1f}", f"{check / step:.5f}") for name, check, step in rows
        ]
        sys.stderr.write(f"{save_rows('finite_check', ('label', 'stage', 'check_us', 'step_us', 'ratio'), table)}\n")


def even() -> list[tuple[str, float, float]]:
    """Return the times of check and step for each stage of "even" and for a chunk on the last one, in us."""
    folder = bench_checkpoint("even")
    pipeline = Pipeline(folder, 2)
    config = read_config(folder)
    chunks = [pipeline.step(Row(0, 0, tuple(prompt_ids(PROMPT_TOKENS)), True, None)) for _ in range(NUM_CHUNKS)]
    done = [pipeline.step(Row(0, PROMPT_TOKENS + step, (7,), False, SAMPLING, (7,))) for step in range(NUM_STEPS)]
    values = (mx.random.normal((1, config.hidden_size)), mx.random.normal((1, config.vocab_size)))
    model, batch = pipeline.runners[1]._model, Batch([Span(0, 0, PROMPT_TOKENS, is_prompt=True)])
    checks = (checked(values[0]), checked(values[1]), lambda: is_finite(model.cache_total(batch)))
    return [
        (name, median_us(check, NUM_CHECKS), statistics.median(step[rank].busy_s for step in steps) * 1e6)
        for name, check, rank, steps in (
            ("even, stage 0", checks[0], 0, done),
            ("even, stage 1", checks[1], 1, done),
            ("even, stage 1, prompt", checks[2], 1, chunks),
        )
    ]


def head() -> tuple[str, float, float]:
    """Return the times of check and step of a large head alone, in microseconds."""
    projection, hidden = mx.random.normal((HIDDEN, VOCAB_SIZE)), mx.random.normal((1, HIDDEN))
    mx.eval(projection, hidden)

    def step() -> None:
        logits = hidden @ projection
        sample_tokens(logits, [SamplingRequest(SAMPLING, 1, (7,))])

    logits = hidden @ projection
    return "head of 163,840 tokens", median_us(checked(logits), NUM_CHECKS), median_us(step, NUM_STEPS)


def checked(values: mx.array) -> Callable[[], object]:
    """Return the check of ``values``."""
    mx.eval(values)
    return lambda: is_finite(mx.sum(values))


def median_us(function: Callable[[], object], count: int) -> float:
    """Return the median time of ``count`` calls in microseconds."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


if __name__ == "__main__":
    main()
