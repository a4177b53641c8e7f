"""Gain of two stages over one for one stream, eight streams and a long prompt; gain of two streams over one stream.

The first two claims give the balance of the two stages: the rate of each one while the other waits.

python -m bench.overlap [--save] [--pairs N] [--only WORDS]

The deployments stay loaded, and the two runs of a pair follow each other. The dtype is float32. Prompts run on the
checkpoint "tall", all else on "even". The scheduler chooses the microbatches.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.checkpoints import bench_checkpoint
from bench.claims import Claim, measure, read_options
from bench.deployments import local_deployment
from mlx_k2.benchmark import Benchmark, Workload
from mlx_k2.scheduling.drafter import DraftMode

NUM_SLOTS = 8
EIGHT, TWO, ONE = (Workload(prompt_tokens=32, generate_tokens=40, streams=streams) for streams in (8, 2, 1))
CHUNK_TOKENS = 16
"""Maximum chunk of a prompt. On a CPU a token costs the same in a short chunk as in a long one."""
PROMPT_OF_16_CHUNKS = Workload(16 * CHUNK_TOKENS, generate_tokens=2, streams=1)
ONE_CHUNK = Workload(CHUNK_TOKENS, generate_tokens=1, streams=1)
DECODE_ONLY = Workload(prompt_tokens=1, generate_tokens=40, streams=1)


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    options = read_options(__doc__)
    even, tall = bench_checkpoint("even"), bench_checkpoint("tall")
    with contextlib.ExitStack() as stack:
        one, two = (benchmark_on(stack, even, num_stages) for num_stages in (1, 2))
        tall_one, tall_two = (benchmark_on(stack, tall, num_stages) for num_stages in (1, 2))
        for claim in (  # the last value is the required ratio
            Claim("token of even alone, first stage over second", *stage_rates(two, DECODE_ONLY)),
            Claim("chunk of tall alone, first stage over second", *stage_rates(tall_two, ONE_CHUNK)),
            Claim("one stream, two stages over one", decode_rate(two, ONE), decode_rate(one, ONE), 0.9),
            Claim("eight streams, two stages over one", decode_rate(two, EIGHT), decode_rate(one, EIGHT), 1.8),
            Claim("two streams over one, on two stages", decode_rate(two, TWO), decode_rate(two, ONE), 1.6),
            Claim("prompt of 16 chunks, two stages over one", prefill_rate(tall_two), prefill_rate(tall_one), 1.7),
        ):
            measure("overlap", claim, options)


def benchmark_on(stack: contextlib.ExitStack, folder: Path, num_stages: int) -> Benchmark:
    """Start stages that run until ``stack`` closes. Drafts are off, so that one stream measures the plain pipeline."""
    deployment = stack.enter_context(local_deployment(folder, num_stages, NUM_SLOTS))
    shape = replace(deployment.shape, chunk_tokens=CHUNK_TOKENS)
    return stack.enter_context(Benchmark(replace(deployment, shape=shape), draft_mode=DraftMode.OFF))


def decode_rate(benchmark: Benchmark, workload: Workload) -> Callable[[], float]:
    """Return a function that measures the decoded tokens per second of all streams together."""

    def measure_rate() -> float:
        tokens_per_s = benchmark.measure(workload).decode_tokens_per_s
        assert tokens_per_s is not None, "the workload decodes a single token: a rate needs two"
        return tokens_per_s

    return measure_rate


def stage_rates(benchmark: Benchmark, workload: Workload) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return a function for each of two stages that measures its tokens per second of computing time.

    ``workload`` must keep only one of the two stages busy at a time, since both compute on the same cores.
    """

    def measure_stage(stage: int) -> float:
        tokens = workload.prompt_tokens + workload.generate_tokens - 1  # the last token is sampled, but not computed
        return tokens / benchmark.measure(workload).stages[stage].compute_s

    return partial(measure_stage, 0), partial(measure_stage, 1)


def prefill_rate(benchmark: Benchmark) -> Callable[[], float]:
    """Return a function that measures prompt tokens per second, of a prompt of 16 chunks."""
    return lambda: benchmark.measure(PROMPT_OF_16_CHUNKS).prefill_tokens_per_s


if __name__ == "__main__":
    main()
