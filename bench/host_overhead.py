"""Python's time per decoded token without the arithmetic: building the graph, reading the plan, answering.

    python -m bench.host_overhead [--pairs N] [--save LABEL]

The same 61-layer checkpoint runs in mlx-k2 (one stage, compiled, as on a GPU) and in mlx-lm, alternately, in float32.
Only the CPU time of the thread that builds the graph counts, so other programs do not disturb the result. The graph is
evaluated after the clock has stopped.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from rich.console import Console
from rich.table import Table

from bench.checkpoints import CONTEXT_TOKENS, bench_checkpoint
from bench.measure import alternate, prompt_ids, ratios, save_rows, summarize
from mlx_k2.config import ModelConfig
from mlx_k2.model.batch import Batch, Span
from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.protocol.framing import Kind, encode_frame, read_frame
from mlx_k2.protocol.messages import Step, StepDone, decode_to_stage, encode_message
from mlx_k2.sampling import REPETITION_WINDOW, SampledToken, Sampling
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.stage.loading import load_stage_model
from mlx_k2.weights.index import CheckpointIndex, read_index_json
from mlx_k2.weights.reader import ShardReader
from tests.model.oracle import load_oracle

PROMPT = prompt_ids(64)
WARM_STEPS = 10
PLANS_AT_ONCE = 100

Build = Callable[[], mx.array]


class Figures(NamedTuple):
    """Microseconds per decoded token: ``building`` as (mlx-k2, mlx-lm) per pair, ``planning`` for mlx-k2's plan."""

    num_layers: int
    building: list[tuple[float, float]]
    planning: list[float]


def main() -> None:
    """Measure and print a table; with --save append a row to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--save", metavar="LABEL", help="append to results/host_overhead.csv under this label")
    options = parser.parse_args()
    figures = measure(options.pairs)
    print_table(figures)
    if options.save:
        ours, theirs = (statistics.median(side) for side in zip(*figures.building, strict=True))
        planning = statistics.median(figures.planning)
        ratio = statistics.median(ratios(figures.building))
        header = ("label", "pairs", "layers", "building_us", "mlx_lm_building_us", "ratio", "plan_us")
        row = (options.save, options.pairs, figures.num_layers, f"{ours:.0f}", f"{theirs:.0f}", f"{ratio:.3f}")
        sys.stderr.write(f"{save_rows('host_overhead', header, [(*row, f'{planning:.1f}')])}\n")


def measure(num_pairs: int) -> Figures:
    """Measure both sides alternately, after WARM_STEPS pairs that do not count."""
    num_layers, ours = mlx_k2_steps()
    theirs = mlx_lm_steps()
    pairs = alternate(lambda: building_us(ours), lambda: building_us(theirs), WARM_STEPS + num_pairs)
    return Figures(num_layers, pairs[WARM_STEPS:], [plan_us() for _ in range(num_pairs)])


def building_us(build: Build) -> float:
    """Return the microseconds that building the next step's graph takes."""
    began = time.thread_time()
    logits = build()
    elapsed = time.thread_time() - began
    mx.eval(logits)
    return elapsed * 1e6


def mlx_k2_steps() -> tuple[int, Build]:
    """Return the number of layers, and the function that builds the next decoding step in mlx-k2."""
    folder = bench_checkpoint("deep")
    config = ModelConfig.from_json((folder / "config.json").read_bytes(), "config.json")
    index = CheckpointIndex.from_json(read_index_json(folder), str(folder))
    reader = ShardReader(config, {name: folder / file for name, file in index.weight_map.items()}, mx.float32)
    layers = range(config.num_hidden_layers)
    cache = LatentCache(len(layers), 1, CONTEXT_TOKENS, config.cache_row_dim, mx.float32)
    model = load_stage_model(config, reader, layers, cache, lambda _: None)
    position = 0

    def run(token_ids: list[int], *, is_prompt: bool) -> mx.array:
        nonlocal position
        batch = Batch([Span(0, position, len(token_ids), is_prompt)])
        position += len(token_ids)
        return model.logits(model.run(model.embed(mx.array(token_ids)), batch)[0])

    mx.eval(run(PROMPT, is_prompt=True))
    return len(layers), lambda: run(PROMPT[:1], is_prompt=False)


def mlx_lm_steps() -> Build:
    """Return the function that builds the next decoding step in mlx-lm."""
    model = load_oracle(bench_checkpoint("deep"))
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([PROMPT]), cache=cache))

    def build() -> mx.array:
        logits: mx.array = model(mx.array([PROMPT[:1]]), cache=cache)
        return logits

    return build


def plan_us() -> float:
    """Return the microseconds to decode one plan and encode one answer, as a stage does for every step."""
    sampling = Sampling(seed=1, temperature=0.6, repetition_penalty=1.1)
    row = Row(0, 4000, (17,), False, sampling, tuple(prompt_ids(REPETITION_WINDOW)))
    plan = encode_frame(Kind.MESSAGE, encode_message(Step(1, (row,))))
    answer = StepDone(1, 0.02, 0.001, tokens=(SampledToken(17),))
    pipe = io.BytesIO(plan * PLANS_AT_ONCE)
    began = time.thread_time()
    for _ in range(PLANS_AT_ONCE):
        frame = read_frame(pipe)
        assert frame is not None
        decode_to_stage(frame.payload)
        encode_frame(Kind.MESSAGE, encode_message(answer))
    return (time.thread_time() - began) * 1e6 / PLANS_AT_ONCE


def print_table(figures: Figures) -> None:
    """Print the microseconds, each as median and interquartile range."""
    ours, theirs = zip(*figures.building, strict=True)
    per_layer = [[value / figures.num_layers for value in side] for side in (ours, theirs)]
    ratio = summarize(ratios(figures.building))
    table = Table(title="microseconds of Python for one decoded token: median (quartiles)")
    for heading in ("", "mlx-k2", "mlx-lm", "ratio"):
        table.add_column(heading)
    table.add_row("building the graph, a layer", summarize(per_layer[0]), summarize(per_layer[1]), ratio)
    table.add_row("building the graph, a step", summarize(ours), summarize(theirs), ratio)
    table.add_row("reading the plan, answering", summarize(figures.planning), "-", "")
    Console().print(table)


if __name__ == "__main__":
    main()
