"""Overlap of two stages: one stream, eight and a long prompt against one stage, two streams against one stream.

Before that, the balance of the two stages is measured: the computing of each one while the other waits.

python -m bench.overlap [--save] [--pairs N] [--only WORDS]

Each deployment keeps running; the two sides of a pair run right after each other. The dtype is float32. Prompts run on
the checkpoint "tall", all else on "even". The program chooses the microbatches.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench.checkpoints import bench_checkpoint
from bench.claims import Claim, measure, read_options
from bench.deployments import local_deployment
from mlx_k2.benchmark import Benchmark, Workload
from mlx_k2.scheduling.drafter import DraftMode

SLOTS = 8
EIGHT = Workload(32, 40, 8)
TWO = Workload(32, 40, 2)
ONE = Workload(32, 40, 1)
CHUNK_TOKENS = 16
"""Maximum chunk of a prompt. On a CPU every matrix row of a product costs the same, so short chunks are as good."""
PROMPT = Workload(16 * CHUNK_TOKENS, 2, 1)
ONE_CHUNK = Workload(CHUNK_TOKENS, 1, 1)
TOKENS = Workload(1, 40, 1)


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    options = read_options(__doc__)
    even, tall = bench_checkpoint("even"), bench_checkpoint("tall")
    with contextlib.ExitStack() as stack:
        one, two = (benchmark_on(stack, even, stages) for stages in (1, 2))
        tall_one, tall_two = (benchmark_on(stack, tall, stages) for stages in (1, 2))
        for claim in (
            Claim("token of even alone, first stage over second", *alone(two, TOKENS)),
            Claim("chunk of tall alone, first stage over second", *alone(tall_two, ONE_CHUNK)),
            Claim("one stream, two stages over one", rate(two, ONE), rate(one, ONE), 0.9),
            Claim("eight streams, two stages over one", rate(two, EIGHT), rate(one, EIGHT), 1.8),
            Claim("two streams over one, on two stages", rate(two, TWO), rate(two, ONE), 1.6),
            Claim("prompt of 16 chunks, two stages over one", prefill(tall_two), prefill(tall_one), 1.7),
        ):
            measure("overlap", claim, options)


def benchmark_on(stack: contextlib.ExitStack, folder: Path, num_stages: int) -> Benchmark:
    """Start stages that run until ``stack`` closes. Without drafts, a lone stream measures the plain pipeline."""
    deployment = stack.enter_context(local_deployment(folder, num_stages, SLOTS))
    shape = replace(deployment.shape, chunk_tokens=CHUNK_TOKENS)
    return stack.enter_context(Benchmark(replace(deployment, shape=shape), draft_mode=DraftMode.OFF))


def rate(benchmark: Benchmark, workload: Workload) -> Callable[[], float]:
    """Return a function that measures decoded tokens per second, over all streams."""

    def decoded() -> float:
        per_second = benchmark.measure(workload).decode_tokens_per_s
        assert per_second is not None, "more than one token came"
        return per_second

    return decoded


def alone(benchmark: Benchmark, workload: Workload) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return functions that measure each stage's tokens per second of computing.

    ``workload`` must keep only one of the two stages busy at a time.
    """

    def computed(stage: int) -> float:
        tokens = workload.prompt_tokens + workload.generate_tokens - 1
        return tokens / benchmark.measure(workload).stages[stage].compute_s

    return lambda: computed(0), lambda: computed(1)


def prefill(benchmark: Benchmark) -> Callable[[], float]:
    """Return a function that measures prompt tokens per second."""
    return lambda: benchmark.measure(PROMPT).prefill_tokens_per_s


if __name__ == "__main__":
    main()
