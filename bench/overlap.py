"""How well two stages overlap: one stream, eight streams and a long prompt against one stage, two streams against one.

python -m bench.overlap [--save] [--pairs N]

Each deployment stays up; the two sides of a pair run right after each other. Float32 on one checkpoint, chunks and
microbatches as the program chooses them. --save appends the rows to results/overlap.csv.
"""

import argparse
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.checkpoints import bench_checkpoint
from bench.deployments import local_deployment
from bench.measure import NUM_PAIRS, alternate, ratios, save_rows, summarize
from mlx_k2.benchmark import Benchmark, Measured, Workload

SLOTS = 8
EIGHT = Workload(32, 40, 8)
TWO = Workload(32, 40, 2)
ONE = Workload(32, 40, 1)
PROMPT = Workload(2048, 2, 1)
"""Sixteen chunks of the length that a CPU's stages take."""


class Claim(NamedTuple):
    """Two sides and the ratio that is asked for."""

    name: str
    first: Callable[[], float]
    second: Callable[[], float]
    wanted: float


def main() -> None:
    """Measure, print, and with --save keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/overlap.csv")
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS)
    arguments = parser.parse_args()
    folder = bench_checkpoint("even")
    with contextlib.ExitStack() as stack:
        one, two = (benchmark_on(stack, folder, stages) for stages in (1, 2))
        claims = (
            Claim("eight streams, two stages over one", rate(two, EIGHT), rate(one, EIGHT), 1.8),
            Claim("one stream, two stages over one", rate(two, ONE), rate(one, ONE), 0.9),
            Claim("two streams over one, on two stages", rate(two, TWO), rate(two, ONE), 1.6),
            Claim("prompt of 16 chunks, two stages over one", prefill(two), prefill(one), 1.7),
        )
        for claim in claims:
            claim.first()  # both warm up
            claim.second()
            report(claim, alternate(claim.first, claim.second, arguments.pairs), arguments.save)


def benchmark_on(stack: contextlib.ExitStack, folder: Path, num_stages: int) -> Benchmark:
    """Stages that stay up; no guesses, so that a lone stream is the plain pipeline."""
    return Benchmark(stack.enter_context(local_deployment(folder, num_stages, SLOTS)), guesses=False)


def rate(benchmark: Benchmark, workload: Workload) -> Callable[[], float]:
    """Decoded tokens per second, of all streams."""
    return lambda: decoded(benchmark.measure(workload))


def prefill(benchmark: Benchmark) -> Callable[[], float]:
    """Prompt tokens per second."""
    return lambda: benchmark.measure(PROMPT).prefill_tokens_per_s


def decoded(measured: Measured) -> float:
    """The rate, which is there when more than one token came."""
    assert measured.decode_tokens_per_s is not None
    return measured.decode_tokens_per_s


def report(claim: Claim, pairs: Sequence[tuple[float, float]], save: bool) -> None:
    """Print the ratio, and keep the pairs."""
    ours, theirs = zip(*pairs, strict=True)
    print(
        f"{claim.name}: {summarize(ours)} against {summarize(theirs)} tok/s, ratio {summarize(ratios(pairs))}, "
        f"wanted {claim.wanted}",
        flush=True,
    )
    if save:
        rows = [(claim.name, f"{first:.3f}", f"{second:.3f}", f"{first / second:.4f}") for first, second in pairs]
        print("saved to", save_rows("overlap", ("claim", "first_tok_s", "second_tok_s", "ratio"), rows))


if __name__ == "__main__":
    main()
