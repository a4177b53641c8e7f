"""mlx-lm's pipeline on two ranks against two stages: one stream, eight streams, a prompt of 16 chunks.

python -m bench.vs_mlx_lm [--save] [--pairs N]

The same checkpoint and prompts, float32 on both sides, both kept loaded, the two sides of a pair right after each
other. For eight streams mlx-lm runs its batch_generate, or one after the other if that is faster; for the prompt it
takes the best of several step sizes. One rank, and mlx-lm in the checkpoint's own dtype, are reported with nothing
asked of them: on a CPU bfloat16 is emulated. --save appends the rows to results/vs_mlx_lm.csv.
"""

import argparse
import contextlib
from collections.abc import Callable
from typing import NamedTuple

from bench.checkpoints import bench_checkpoint
from bench.deployments import local_deployment
from bench.measure import NUM_PAIRS, alternate, ratios, save_rows, summarize
from bench.mlx_lm_ranks import MlxLmRanks, mlx_lm_ranks
from bench.overlap import EIGHT, ONE, PROMPT, SLOTS, prefill, rate
from mlx_k2.benchmark import Benchmark, Workload

PREFILL_STEPS = (128, 256, 512, 2048)
FEW = Workload(ONE.prompt_tokens, 8, 1)
"""For a side that takes ten times as long."""


class Comparison(NamedTuple):
    """mlx-k2's side and mlx-lm's, in tokens per second, and the ratio that is asked for."""

    name: str
    ours: Callable[[], float]
    theirs: Callable[[], float]
    wanted: float | None = None


def main() -> None:
    """Measure, print, and with --save keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/vs_mlx_lm.csv")
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS)
    arguments = parser.parse_args()
    folder = bench_checkpoint("even")
    with contextlib.ExitStack() as stack:
        stages = Benchmark(stack.enter_context(local_deployment(folder, 2, SLOTS)), guesses=False)
        alone, pair = (stack.enter_context(mlx_lm_ranks(folder, count)) for count in (1, 2))
        own_dtype = stack.enter_context(mlx_lm_ranks(folder, 2, own_dtype=True))
        comparisons = (
            Comparison("one stream", rate(stages, ONE), decode(pair, ONE), 1.0),
            Comparison("eight streams", rate(stages, EIGHT), eight_streams(pair), 1.8),
            Comparison("prompt of 16 chunks", prefill(stages), longest_prompt(pair), 1.1),
            Comparison("one stream, mlx-lm on one rank", rate(stages, ONE), decode(alone, ONE)),
            Comparison("one stream, mlx-lm in its own dtype", rate(stages, FEW), decode(own_dtype, FEW)),
        )
        for comparison in comparisons:
            comparison.ours()  # both warm up
            comparison.theirs()
            report(comparison, alternate(comparison.ours, comparison.theirs, arguments.pairs), arguments.save)


def decode(ranks: MlxLmRanks, workload: Workload) -> Callable[[], float]:
    """mlx-lm's decoded tokens per second, of all streams."""
    return lambda: ranks.rates(workload, max(PREFILL_STEPS))["decode"]


def eight_streams(ranks: MlxLmRanks) -> Callable[[], float]:
    """Those of eight streams, together or in turn: each time the faster of the two."""
    return lambda: max(decode(ranks, EIGHT)(), decode(ranks, ONE)())


def longest_prompt(ranks: MlxLmRanks) -> Callable[[], float]:
    """Its prompt tokens per second at the step size that is best, which is found now."""
    rates = {step: ranks.rates(PROMPT, step)["prefill"] for step in PREFILL_STEPS}
    print("mlx-lm's prefill by step size:", ", ".join(f"{step}: {rate:.1f}" for step, rate in rates.items()), "tok/s")
    best = max(rates, key=lambda step: rates[step])
    return lambda: ranks.rates(PROMPT, best)["prefill"]


def report(comparison: Comparison, pairs: list[tuple[float, float]], save: bool) -> None:
    """Print the ratio, and keep the pairs."""
    ours, theirs = zip(*pairs, strict=True)
    wanted = f", wanted {comparison.wanted}" if comparison.wanted else ""
    print(
        f"{comparison.name}: mlx-k2 {summarize(ours)}, mlx-lm {summarize(theirs)} tok/s, "
        f"ratio {summarize(ratios(pairs))}{wanted}",
        flush=True,
    )
    if save:
        rows = [(comparison.name, f"{first:.3f}", f"{second:.3f}", f"{first / second:.4f}") for first, second in pairs]
        print("saved to", save_rows("vs_mlx_lm", ("what", "mlx_k2_tok_s", "mlx_lm_tok_s", "ratio"), rows))


if __name__ == "__main__":
    main()
