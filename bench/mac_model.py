"""A model of a Mac: time per token and per prompt from launches, command buffers, bytes and operations.

python -m bench.mac_model [--readme]

Every figure is computed; nothing here was measured. The constants are in bench/mac_constants.py with their sources.
One common factor multiplies every time: the median of published time over computed time. It prints the published rows
with their errors, this program before and after its settings for a GPU, and predictions. --readme writes the table of
bench/README.md.

A token reads its weights once, launch after launch. A launch that depends on the one before costs a fixed time, and so
does a command buffer. A prompt computes its chunks one after the other on each stage. Routed experts compute full tiles
(mlx_k2/scheduling/cost_model.py). Attention of a chunk computes all pairs with the keys up to the chunk's end.
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from bench.graph_launches import MLX_LIMITS, command_buffers, expert_layer, k2_config, num_launches, token_sizes
from bench.mac_constants import CONSTANTS, PUBLISHED, Published
from bench.measure import ROOT, with_part
from mlx_k2.config import ModelConfig
from mlx_k2.deployment.stage_costs import stage_sizes
from mlx_k2.scheduling.cost_model import StageSizes, expected_tiles, pipeline_s
from mlx_k2.stage.mlx_settings import LONG_BUFFERS

MADE_BY = "python -m bench.mac_model --readme"
CLOSE = 0.2
MLX_LM_MOE_NODES, OWN_MOE_NODES = 23, 9  # of an expert block: results/bytes_per_token.csv
CONTEXTS = (1024, 4096, 32768, 131072)
HEAD_BYTES = 0.95e9  # of a draft: the core and 32,000 rows of the output projection, 8 bits and scales of 64 weights
HEAD_LAUNCHES = 30
PROMPT_CHUNK = 2048  # mlx-lm's prefill_step_size
UNSHARDED_LAYERS_BYTES = 2 * 7168 * (1536 + 576) * 61  # q_a and kv_a, which every rank of mlx-lm computes alone


def constant(name: str) -> float:
    """Return a constant's value."""
    return CONSTANTS[name].value


@dataclass(frozen=True)
class Program:
    """A program with its weights' format: what a token launches and reads, and how a prompt is computed."""

    name: str
    expert_bits: float
    dense_bits: float
    launches_per_layer: int
    buffers: int
    """Command buffers of a token; 0 for a program that is not MLX."""
    expert_bandwidth: str = "expert bandwidth"
    expanded_cache: bool = False
    """Keys and values of each head are cached, not latents."""
    all_reduces: bool = False
    """Each layer is divided over the Macs, with two all-reduces a layer; otherwise whole layers are."""
    tile_rows: int = 16
    prompt_factor: float = 1.0
    fused: str = "none"
    """Chunks of a prompt whose attention is MLX's fused kernel: "none", "first" or "all"."""
    chunk: int = PROMPT_CHUNK


@dataclass(frozen=True)
class Mac:
    """A chip as a factor on an M3 Ultra's bandwidth and operations."""

    name: str
    bandwidth: float = 1.0
    operations: float = 1.0
    memory_gb: int = 512


M3_ULTRA = Mac("M3 Ultra")
M5_ULTRA = Mac("M5 Ultra", constant("M5 bandwidth"), constant("M5 operations"), 256)


@cache
def sizes(model: str) -> StageSizes:
    """Return the bytes and operations of all layers of a model."""
    return stage_sizes(config(model), 0, 61, 2)


@cache
def config(model: str) -> ModelConfig:
    """Return a model's configuration."""
    if model == "K2":
        return k2_config()
    shape = {"n_routed_experts": 256, "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280}
    return k2_config(**shape, first_k_dense_replace=3)


def dense_bytes(model: str, bits: float) -> float:
    """Return the bytes of all weights but routed experts and embedding."""
    return (sizes(model).dense_bytes + sizes(model).head_bytes) * bits / 16


def token_s(program: Program, model: str, macs: int, context: int, mac: Mac = M3_ULTRA) -> float:
    """Return the computed seconds of one token of one stream, without the common factor."""
    shape, layers = sizes(model), config(model).num_hidden_layers
    experts = shape.expert_bytes * shape.experts_per_token * program.expert_bits / 4.5
    dense = dense_bytes(model, program.dense_bits)
    position_bytes = shape.position_bytes * _expansion(model) if program.expanded_cache else shape.position_bytes
    attention = max(
        0.0
        if program.expanded_cache
        else shape.absorbed_operations * context / constant("dense operations") / mac.operations,
        position_bytes * context / constant("dense bandwidth") / mac.bandwidth,
    )
    reading = experts / constant(program.expert_bandwidth) + dense / constant("dense bandwidth")
    reading = reading / mac.bandwidth + attention
    fixed = layers * program.launches_per_layer * constant("launch") + program.buffers * constant("command buffer")
    if not program.all_reduces:
        return reading + fixed + (macs - 1) * constant("hop") + constant("host")
    alone = (sizes(model).head_bytes + UNSHARDED_LAYERS_BYTES) * program.dense_bits / 16 / constant("dense bandwidth")
    shared = alone / mac.bandwidth + (reading - alone / mac.bandwidth) / macs
    return shared + fixed + 2 * layers * constant("all-reduce") + constant("host")


def chunk_s(program: Program, model: str, first: int, end: int, mac: Mac = M3_ULTRA) -> float:
    """Return the computed seconds of the chunk from position ``first`` to ``end``, on one machine with all layers."""
    shape, count = sizes(model), end - first
    expert_speed = constant("expert operations") * program.prompt_factor
    tiles = expected_tiles(shape.num_experts, shape.experts_per_token, count, program.tile_rows)
    routed = tiles * program.tile_rows * shape.operations_per_expert_token / expert_speed / mac.operations
    read = shape.expert_bytes * shape.num_experts * program.expert_bits / 4.5 / constant("dense bandwidth")
    dense = (shape.operations_per_token * count + shape.rebuild_operations * end) / constant("dense operations")
    pairs = count * end
    scores = pairs * config(model).num_attention_heads * config(model).num_hidden_layers * constant("score traffic")
    unfused = shape.naive_operations * pairs / constant("dense operations") / mac.operations
    attention = unfused + scores / constant("dense bandwidth") / mac.bandwidth
    if program.fused == "all" or (program.fused == "first" and first == 0):
        width = 2 * config(model).qk_head_dim / (config(model).qk_head_dim + config(model).v_head_dim)
        causal = (first + end) / 2 / end  # the kernel skips keys after the last query of a tile
        attention = shape.naive_operations * width * pairs * causal / constant("fused attention")
    return max(routed, read / mac.bandwidth) + dense / mac.operations + attention


def _expansion(model: str) -> float:
    """Return the bytes of the keys and values of all heads, divided by those of the latents."""
    one = config(model)
    return one.num_attention_heads * (one.qk_head_dim + one.v_head_dim) / one.latent_dim


def prompt_s(program: Program, model: str, macs: int, tokens: int, mac: Mac = M3_ULTRA) -> float:
    """Return the computed seconds of a prompt whose layers are divided evenly over the Macs."""
    chunks = range(0, tokens, min(program.chunk, tokens))
    times = [chunk_s(program, model, first, min(tokens, first + program.chunk), mac) for first in chunks]
    return pipeline_s([[seconds / macs] * macs for seconds in times])


def others() -> dict[str, Program]:
    """Return the programs of the published rows. Their formats are those of each row."""
    nodes = num_launches(expert_layer(k2_config())) + MLX_LM_MOE_NODES - OWN_MOE_NODES
    buffers = command_buffers(token_sizes(k2_config(), None), MLX_LIMITS)
    mlx_lm = Program("mlx-lm", 5.0, 16, nodes, buffers)
    return {
        "mlx-lm": mlx_lm,
        "mlx-lm expanded": replace(mlx_lm, name="mlx-lm expanded", expanded_cache=True),
        "mlx-lm TP": replace(mlx_lm, name="mlx-lm TP", all_reduces=True),
        "exo TP": replace(mlx_lm, name="exo TP", all_reduces=True),
        "llama.cpp": replace(mlx_lm, name="llama.cpp", buffers=0),
    }


def before(dense_bits: float) -> Program:
    """Return this program with MLX's own settings, its own prompt kernel and fused attention of long prompts."""
    buffers = command_buffers(token_sizes(k2_config(), None if dense_bits == 16 else 8), MLX_LIMITS)
    return Program(
        "before",
        4.5,
        dense_bits,
        num_launches(expert_layer(k2_config())),
        buffers,
        "own expert bandwidth",
        tile_rows=32,
        prompt_factor=constant("own prompt kernel"),
        fused="all",
    )


def after(dense_bits: float, mac: Mac = M3_ULTRA) -> Program:
    """Return this program with its settings for the chip, MLX's prompt kernel, unfused attention and longer chunks."""
    buffers = command_buffers(token_sizes(k2_config(), None if dense_bits == 16 else 8), LONG_BUFFERS)
    as_on_m3 = replace(
        before(dense_bits),
        name="after",
        buffers=buffers,
        tile_rows=16,
        prompt_factor=1.0,
        fused="first",
        chunk=2 * PROMPT_CHUNK,
    )
    return replace(as_on_m3, buffers=before(dense_bits).buffers, fused="none") if mac is M5_ULTRA else as_on_m3


def best_prompt(program: Program, macs: int, tokens: int, mac: Mac = M3_ULTRA) -> float:
    """Return the seconds with the best chunk of several; before, with the one that the cost model then chose."""
    if program.name == "before":
        return prompt_s(replace(program, chunk=752 if tokens <= 4096 else 2048), "K2", macs, tokens, mac)
    lengths = {min(program.chunk, -(-tokens // count)) for count in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)}
    useful = [length for length in lengths if length >= 256]
    return min(prompt_s(replace(program, chunk=length), "K2", macs, tokens, mac) for length in useful)


def computed_rate(row: Published) -> float:
    """Return the computed tokens per second of a published row, without the common factor."""
    program = replace(others()[row.program], expert_bits=row.expert_bits, dense_bits=row.dense_bits)
    if row.kind == "decode":
        return 1 / token_s(program, row.model, row.macs, row.tokens)
    if row.first:
        return (row.tokens - row.first) / chunk_s(program, row.model, row.first, row.tokens)
    return row.tokens / prompt_s(program, row.model, row.macs, row.tokens)


@cache
def common_factor() -> float:
    """Return the factor on every computed time: the median of published time over computed time."""
    return statistics.median(computed_rate(row) / row.rate for row in PUBLISHED)


def errors() -> list[tuple[Published, float, float]]:
    """Return each published row, its computed rate and the relative error."""
    rates = [(row, computed_rate(row) / common_factor()) for row in PUBLISHED]
    return [(row, rate, rate / row.rate - 1) for row, rate in rates]


def decode_rate(program: Program, macs: int, context: int, mac: Mac = M3_ULTRA, acceptance_rate: float = 0.0) -> float:
    """Return the predicted tokens per second of one stream.

    While one stream runs, the other stages compute draft tokens. ``acceptance_rate`` of them are accepted, each only
    if all before it were.
    """
    accepted = sum(acceptance_rate**count for count in range(macs))
    return accepted / token_s(program, "K2", macs, context, mac) / common_factor()


def head_rate(program: Program, macs: int, context: int, mac: Mac, acceptance_rate: float) -> float:
    """Return the computed tokens per second of one stream with a draft head, which is right with ``acceptance_rate``.

    A right draft takes a cycle, the time of all stages and of the head's drafts in equal parts; a wrong one the time of
    all stages. The head is K2's in 8 bits, with 32,000 of its tokens.
    """
    whole_s = token_s(program, "K2", macs, context, mac)
    draft_s = HEAD_BYTES / (constant("dense bandwidth") * mac.bandwidth) + HEAD_LAUNCHES * constant("launch")
    cycle_s = (whole_s + (macs - 1) * draft_s) / macs
    return 1 / (acceptance_rate * cycle_s + (1 - acceptance_rate) * whole_s) / common_factor()


def prefill_rate(program: Program, macs: int, tokens: int, mac: Mac = M3_ULTRA) -> float:
    """Return the predicted tokens per second of a prompt."""
    return tokens / best_prompt(program, macs, tokens, mac) / common_factor()


def comparison() -> Iterator[str]:
    """Yield the lines of this program before and after, on two M3 Ultras."""
    yield "| context | bits | decode before | decode after | prefill before | prefill after |"
    yield "|---|---|---|---|---|---|"
    for context in CONTEXTS:
        for bits, name in ((16, "as shipped"), (8.5, "8")):
            decode = [decode_rate(program, 2, context) for program in (before(bits), after(bits))]
            prefill = [prefill_rate(program, 2, context) for program in (before(bits), after(bits))]
            cells = (f"{decode[0]:.1f}", f"{decode[1]:.1f}", f"{prefill[0]:.0f}", f"{prefill[1]:.0f}")
            yield f"| {context} | {name} | {' | '.join(cells)} |"


def predictions() -> Iterator[str]:
    """Yield the lines of predictions for 2 to 4 Macs of two chips."""
    yield "| Macs | bits | context | decode | with drafts, half accepted | 80% accepted | prefill |"
    yield "|---|---|---|---|---|---|---|"
    for mac in (M3_ULTRA, M5_ULTRA):
        for macs in (2, 3, 4):
            fits = "" if macs * mac.memory_gb * 0.75 > 620 else f" (more than {mac.memory_gb} GB each)"
            for bits, name in ((16, "as shipped"), (8.5, "8")):
                program = after(bits, mac)
                for context in CONTEXTS:
                    rates = [decode_rate(program, macs, context, mac, accepted) for accepted in (0.0, 0.5, 0.8)]
                    cells = " | ".join(f"{rate:.1f}" for rate in rates)
                    prefill = prefill_rate(program, macs, context, mac)
                    yield f"| {macs} {mac.name}{fits} | {name} | {context} | {cells} | {prefill:.0f} |"


def head_predictions() -> Iterator[str]:
    """Yield the lines of a draft head: computed tokens per second over acceptance rates, on M3 Ultras."""
    rates = (0.5, 0.64, 0.72, 0.8, 0.853, 0.9, 1.0)
    yield f"| Macs | bits | no drafts | {' | '.join(f'{rate:g} accepted' for rate in rates)} |"
    yield f"|---|---|---|{'---|' * len(rates)}"
    for macs in (2, 3, 4):
        for bits, name in ((16, "as shipped"), (8.5, "8")):
            program = after(bits)
            cells = " | ".join(f"{head_rate(program, macs, CONTEXTS[0], M3_ULTRA, rate):.1f}" for rate in rates)
            yield f"| {macs} | {name} | {decode_rate(program, macs, CONTEXTS[0]):.1f} | {cells} |"


def readme_part() -> str:
    """Return the part of bench/README.md: how far off the model is, and what it predicts for two M3 Ultras."""
    close = [row for row, _, error in errors() if abs(error) <= CLOSE]
    lines = [
        "Computed, not measured: tokens per second on two M3 Ultras, with MLX's own settings (before) and the ones",
        f"that a stage sets (after). The model is within 20% of {len(close)} of {len(PUBLISHED)} published figures of",
        "other programs (`python -m bench.mac_model` names all).",
        "",
        *comparison(),
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the tables; with --readme write the page's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="write the table of bench/README.md")
    if parser.parse_args().readme:
        readme = ROOT / "bench" / "README.md"
        readme.write_text(with_part(readme.read_text(), MADE_BY, readme_part()))
        return
    for name, (value, unit, known, source) in CONSTANTS.items():
        print(f"{name}: {value:g} {unit} ({known}: {source})")
    print(f"common factor on every time: {common_factor():.3f}\n")
    for row, rate, error in errors():
        mark = "" if abs(error) <= CLOSE else "  <-- more than 20% off"
        what = f"{row.program}, {row.model} {row.expert_bits}/{row.dense_bits} bits, {row.macs} Mac, {row.kind}"
        print(
            f"{what} at {row.tokens}: published {row.rate:.1f}, computed {rate:.1f} ({error:+.0%}); {row.source}{mark}"
        )
    num_close = sum(abs(error) <= CLOSE for _, _, error in errors())
    print(f"{num_close} of {len(PUBLISHED)} rows within 20%\n")
    print("\n".join((*comparison(), "", *predictions())))
    print(f"\nComputed, not measured: tokens per second with a draft head, M3 Ultras, at {CONTEXTS[0]} tokens")
    print("\n".join(head_predictions()))


if __name__ == "__main__":
    main()
