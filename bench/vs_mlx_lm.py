"""Two stages of mlx-k2 against mlx-lm's pipeline on two ranks: one stream, eight streams, a prompt of 16 chunks.

python -m bench.vs_mlx_lm [--save] [--pairs N] [--only WORDS]

Both sides use the same checkpoint and prompts in float32, and stay loaded. The two sides of a pair run right after each
other. For eight streams mlx-lm runs its batch_generate, or the streams one after the other if that is faster. For the
prompt it uses the best of several step sizes. One rank is reported without a required ratio.
"""

import contextlib
import functools
from collections.abc import Callable

from bench.checkpoints import bench_checkpoint
from bench.claims import Claim, measure, read_options
from bench.mlx_lm_ranks import MlxLmRanks, mlx_lm_ranks
from bench.overlap import EIGHT, ONE, PROMPT, benchmark_on, prefill, rate
from mlx_k2.benchmark import Workload

PREFILL_STEPS = (8, 16, 32, 64)


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    options = read_options(__doc__)
    even, tall = bench_checkpoint("even"), bench_checkpoint("tall")
    with contextlib.ExitStack() as stack:
        stages, tall_stages = (benchmark_on(stack, folder, 2) for folder in (even, tall))
        alone, pair = (stack.enter_context(mlx_lm_ranks(even, count)) for count in (1, 2))
        tall_pair = stack.enter_context(mlx_lm_ranks(tall, 2))
        for claim in (
            Claim("one stream", rate(stages, ONE), decode(pair, ONE), 1.0),
            Claim("eight streams", rate(stages, EIGHT), eight_streams(pair), 1.8),
            Claim("prompt of 16 chunks", prefill(tall_stages), longest_prompt(tall_pair), 1.1),
            Claim("one stream, mlx-lm on one rank", rate(stages, ONE), decode(alone, ONE)),
        ):
            measure("vs_mlx_lm", claim, options)


def decode(ranks: MlxLmRanks, workload: Workload) -> Callable[[], float]:
    """Return a function that measures mlx-lm's decoded tokens per second, over all streams."""
    return lambda: ranks.rates(workload, max(PREFILL_STEPS))["decode"]


def eight_streams(ranks: MlxLmRanks) -> Callable[[], float]:
    """Return a function that measures mlx-lm's eight streams together and one by one, and returns the faster rate."""
    together, in_turn = decode(ranks, EIGHT), decode(ranks, ONE)
    return lambda: max(together(), in_turn())


def longest_prompt(ranks: MlxLmRanks) -> Callable[[], float]:
    """Return a function that measures prompt tokens per second at mlx-lm's best step size, found in the first run."""

    @functools.cache
    def best() -> int:
        rates = {step: ranks.rates(PROMPT, step)["prefill"] for step in PREFILL_STEPS}
        print("mlx-lm's prefill by step size:", ", ".join(f"{step}: {rate:.1f}" for step, rate in rates.items()))
        return max(rates, key=lambda step: rates[step])

    return lambda: ranks.rates(PROMPT, best())["prefill"]


if __name__ == "__main__":
    main()
