"""Python's time per decoded token, in mlx-k2 and in mlx-lm: building MLX's graph; in mlx-k2 also the plan's messages.

    python -m bench.host_overhead [--pairs N] [--save LABEL]

The same 61-layer checkpoint runs in mlx-k2 (one stage, compiled, as on a GPU) and in mlx-lm, in turn, in float32. The
figures are CPU time of the thread that builds the graph, so that other programs do not disturb them. The evaluation of
the graph is not part of them.
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
NUM_WARM_STEPS = 10
NUM_PLANS = 100
"""Plans in one measurement, because a single one takes a few microseconds."""

BuildGraph = Callable[[], mx.array]


class PythonTimes(NamedTuple):
    """Microseconds per decoded token: pairs (mlx-k2, mlx-lm) for the graph, and mlx-k2's plan and answer."""

    num_layers: int
    graph_us: list[tuple[float, float]]
    plan_us: list[float]


def main() -> None:
    """Measure and print a table; with --save append a row to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100, help="pairs of decode steps  [default: 100]")
    parser.add_argument("--save", metavar="LABEL", help="append to results/host_overhead.csv under this label")
    options = parser.parse_args()
    times = measure(options.pairs)
    print_table(times)
    if options.save:
        ours_us, theirs_us = (statistics.median(side) for side in zip(*times.graph_us, strict=True))
        ratio = statistics.median(ratios(times.graph_us))
        header = ("label", "pairs", "layers", "building_us", "mlx_lm_building_us", "ratio", "plan_us")
        medians = (f"{ours_us:.0f}", f"{theirs_us:.0f}", f"{ratio:.3f}", f"{statistics.median(times.plan_us):.1f}")
        row = (options.save, options.pairs, times.num_layers, *medians)
        sys.stderr.write(f"{save_rows('host_overhead', header, [row])}\n")


def measure(num_pairs: int) -> PythonTimes:
    """Measure both programs in turn. The first NUM_WARM_STEPS pairs are not counted."""
    num_layers, ours = mlx_k2_graph_builder()
    theirs = mlx_lm_graph_builder()
    pairs = alternate(lambda: graph_us(ours), lambda: graph_us(theirs), NUM_WARM_STEPS + num_pairs)
    return PythonTimes(num_layers, pairs[NUM_WARM_STEPS:], [plan_us() for _ in range(num_pairs)])


def graph_us(build: BuildGraph) -> float:
    """Return the microseconds in which ``build`` builds the graph of the next step."""
    started_at = time.thread_time()
    logits = build()
    elapsed_s = time.thread_time() - started_at
    mx.eval(logits)
    return elapsed_s * 1e6


def mlx_k2_graph_builder() -> tuple[int, BuildGraph]:
    """Return the number of layers, and a function that builds the graph of the next decode step in mlx-k2."""
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


def mlx_lm_graph_builder() -> BuildGraph:
    """Return a function that builds the graph of the next decode step in mlx-lm."""
    model = load_oracle(bench_checkpoint("deep"))
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([PROMPT]), cache=cache))

    def build() -> mx.array:
        logits: mx.array = model(mx.array([PROMPT[:1]]), cache=cache)
        return logits

    return build


def plan_us() -> float:
    """Return the microseconds in which a stage decodes one plan and encodes its answer."""
    sampling = Sampling(seed=1, temperature=0.6, repetition_penalty=1.1)
    window = tuple(prompt_ids(REPETITION_WINDOW))
    row = Row(slot=0, position=4000, token_ids=(17,), is_prompt=False, sampling=sampling, recent_ids=window)
    plan = encode_frame(Kind.MESSAGE, encode_message(Step(1, (row,))))
    answer = StepDone(number=1, busy_s=0.02, receive_s=0.001, tokens=(SampledToken(17),))
    pipe = io.BytesIO(plan * NUM_PLANS)
    started_at = time.thread_time()
    for _ in range(NUM_PLANS):
        frame = read_frame(pipe)
        assert frame is not None
        decode_to_stage(frame.payload)
        encode_frame(Kind.MESSAGE, encode_message(answer))
    return (time.thread_time() - started_at) * 1e6 / NUM_PLANS


def print_table(times: PythonTimes) -> None:
    """Print median and quartiles of the times, in microseconds."""
    ours_us, theirs_us = zip(*times.graph_us, strict=True)
    ours_per_layer, theirs_per_layer = (
        summarize([step_us / times.num_layers for step_us in side]) for side in (ours_us, theirs_us)
    )
    ratio = summarize(ratios(times.graph_us))
    table = Table(title="microseconds of Python for one decoded token: median (quartiles)")
    for heading in ("", "mlx-k2", "mlx-lm", "ratio"):
        table.add_column(heading)
    table.add_row("building the graph, per layer", ours_per_layer, theirs_per_layer, ratio)
    table.add_row("building the graph, per step", summarize(ours_us), summarize(theirs_us), ratio)
    table.add_row("decoding the plan, encoding the answer", summarize(times.plan_us), "-", "")
    Console().print(table)


if __name__ == "__main__":
    main()
