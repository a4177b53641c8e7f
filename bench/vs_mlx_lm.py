"""Comparison of two stages of mlx-k2 with mlx-lm's pipeline on two ranks: one stream, eight streams, a long prompt.

python -m bench.vs_mlx_lm [--save] [--pairs N] [--only WORDS]

Both programs use the same checkpoint in float32 and random prompts of the same lengths, stay loaded, and run in turn.
mlx-lm runs eight streams as a batch, or one after the other if that is faster; for the long prompt it uses the best of
several prefill step sizes. The ratio to mlx-lm on one rank is only reported.
"""

import contextlib
import functools
from collections.abc import Callable

from bench.checkpoints import bench_checkpoint
from bench.claims import Claim, measure, read_options
from bench.mlx_lm_ranks import MlxLmRanks, mlx_lm_ranks
from bench.overlap import EIGHT, ONE, PROMPT_OF_16_CHUNKS, benchmark_on, decode_rate, prefill_rate
from mlx_k2.benchmark import Workload

PREFILL_STEPS = (8, 16, 32, 64)


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    options = read_options(__doc__)
    even, tall = bench_checkpoint("even"), bench_checkpoint("tall")
    with contextlib.ExitStack() as stack:
        stages, tall_stages = (benchmark_on(stack, folder, 2) for folder in (even, tall))
        one_rank, two_ranks = (stack.enter_context(mlx_lm_ranks(even, count)) for count in (1, 2))
        tall_ranks = stack.enter_context(mlx_lm_ranks(tall, 2))
        for claim in (  # the last value is the required ratio
            Claim("one stream", decode_rate(stages, ONE), mlx_lm_decode_rate(two_ranks, ONE), 1.0),
            Claim("eight streams", decode_rate(stages, EIGHT), mlx_lm_best_of_eight(two_ranks), 1.8),
            Claim("prompt of 16 chunks", prefill_rate(tall_stages), mlx_lm_prefill_rate(tall_ranks), 1.1),
            Claim("one stream, mlx-lm on one rank", decode_rate(stages, ONE), mlx_lm_decode_rate(one_rank, ONE)),
        ):
            measure("vs_mlx_lm", claim, options)


def mlx_lm_decode_rate(ranks: MlxLmRanks, workload: Workload) -> Callable[[], float]:
    """Return a function that measures mlx-lm's decoded tokens per second, of all streams together.

    The prompts are short: each fits in one step of the largest size.
    """
    return lambda: ranks.rates(workload, max(PREFILL_STEPS))["decode"]


def mlx_lm_best_of_eight(ranks: MlxLmRanks) -> Callable[[], float]:
    """Return a function that measures mlx-lm's rate of eight streams, as a batch or in turn: the higher of both."""
    as_batch, in_turn = mlx_lm_decode_rate(ranks, EIGHT), mlx_lm_decode_rate(ranks, ONE)
    return lambda: max(as_batch(), in_turn())


def mlx_lm_prefill_rate(ranks: MlxLmRanks) -> Callable[[], float]:
    """Return a function that measures mlx-lm's prompt tokens per second. Its first call finds the best step size."""

    @functools.cache
    def best_step() -> int:
        rates = {step: ranks.rates(PROMPT_OF_16_CHUNKS, step)["prefill"] for step in PREFILL_STEPS}
        print("mlx-lm's prefill by step size:", ", ".join(f"{step}: {rate:.1f}" for step, rate in rates.items()))
        return max(rates, key=lambda step: rates[step])

    return lambda: ranks.rates(PROMPT_OF_16_CHUNKS, best_step())["prefill"]


if __name__ == "__main__":
    main()
