"""Performance model of a Mac: time per token and per prompt from launches, command buffers, bytes and operations.

python -m bench.mac_model [--readme]

bench/mac_times.py computes the times from the constants in bench/mac_constants.py; nothing was measured here.
One common factor multiplies every time: the median of published time over computed time. The script prints the
published rates with the model's errors, the rates of mlx-k2 before and after its settings for a GPU, and predictions.
--readme writes the table of bench/README.md.
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from bench.graph_launches import MLX_LIMITS, command_buffers, expert_layer, k2_config, launch_sizes, num_launches
from bench.mac_constants import CONSTANTS, PUBLISHED, Published
from bench.mac_times import M3_ULTRA, M5_ULTRA, PROMPT_CHUNK, Mac, Program, chunk_s, constant, prompt_s, token_s
from bench.measure import ROOT, replace_generated
from mlx_k2.stage.mlx_settings import LONG_BUFFERS, BufferLimits

MADE_BY = "python -m bench.mac_model --readme"
CLOSE_ERROR = 0.2
MLX_LM_MOE_LAUNCHES, OWN_MOE_LAUNCHES = 23, 9  # of a block with routed experts: results/bytes_per_token.csv
CONTEXTS = (1024, 4096, 32768, 131072)
DRAFT_HEAD_BYTES = 0.95e9  # K2's draft head with 32,000 rows of the output projection, in 8 bits, scales of 64 weights
DRAFT_HEAD_LAUNCHES = 30
MODEL_GB = 620  # K2's weights, and room for cache and activations
USABLE_MEMORY = 0.75  # fraction of a Mac's memory that its GPU may use by default
DENSE_BITS = ((16, "as shipped"), (8.5, "8"))  # 8.5: a scale and a bias of 16 bits each for 64 weights of 8 bits


def other_programs() -> dict[str, Program]:
    """Return the programs of the published figures by name. A figure has its own bits, which replace the program's."""
    launches = num_launches(expert_layer(k2_config())) + MLX_LM_MOE_LAUNCHES - OWN_MOE_LAUNCHES
    buffers = command_buffers(launch_sizes(k2_config(), None), MLX_LIMITS)
    mlx_lm = Program("mlx-lm", expert_bits=5.0, dense_bits=16, launches_per_layer=launches, buffers=buffers)
    return {
        "mlx-lm": mlx_lm,
        "mlx-lm expanded": replace(mlx_lm, name="mlx-lm expanded", expanded_cache=True),
        "mlx-lm TP": replace(mlx_lm, name="mlx-lm TP", all_reduces=True),
        "exo TP": replace(mlx_lm, name="exo TP", all_reduces=True),
        "llama.cpp": replace(mlx_lm, name="llama.cpp", buffers=0),
    }


def before(dense_bits: float) -> Program:
    """Return mlx-k2 with MLX's own settings, and with its former prompt kernel and fused attention."""
    return Program(
        "before",
        expert_bits=4.5,
        dense_bits=dense_bits,
        launches_per_layer=num_launches(expert_layer(k2_config())),
        buffers=own_buffers(dense_bits, MLX_LIMITS),
        expert_bandwidth="own expert bandwidth",
        tile_rows=32,
        prompt_factor=constant("former prompt kernel"),
        fused="all",
    )


def after(dense_bits: float, mac: Mac = M3_ULTRA) -> Program:
    """Return mlx-k2 with MLX's prompt kernel, longer chunks, and its settings for the chip.

    On an M3 Ultra these are long command buffers, and fused attention in the first chunk of a prompt only. On an M5
    Ultra they are MLX's own command buffers, and no fused attention.
    """
    on_m3 = replace(
        before(dense_bits),
        name="after",
        buffers=own_buffers(dense_bits, LONG_BUFFERS),
        tile_rows=16,
        prompt_factor=1.0,
        fused="first",
        chunk=2 * PROMPT_CHUNK,
    )
    return replace(on_m3, buffers=before(dense_bits).buffers, fused="none") if mac is M5_ULTRA else on_m3


def own_buffers(dense_bits: float, limits: BufferLimits) -> int:
    """Return the command buffers of a token in mlx-k2."""
    return command_buffers(launch_sizes(k2_config(), None if dense_bits == 16 else 8), limits)


def best_prompt(program: Program, num_macs: int, tokens: int, mac: Mac = M3_ULTRA) -> float:
    """Return the seconds of a prompt, without the common factor.

    The chunk length is the best of several, or for the program "before" the one that its cost model chose.
    """
    if program.name == "before":
        return prompt_s(replace(program, chunk=752 if tokens <= 4096 else 2048), "K2", num_macs, tokens, mac)
    lengths = {min(program.chunk, -(-tokens // count)) for count in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)}
    useful = [length for length in lengths if length >= 256]
    return min(prompt_s(replace(program, chunk=length), "K2", num_macs, tokens, mac) for length in useful)


def computed_rate(row: Published) -> float:
    """Return the tokens per second that the model computes for a published figure, without the common factor."""
    program = replace(other_programs()[row.program], expert_bits=row.expert_bits, dense_bits=row.dense_bits)
    if row.kind == "decode":
        return 1 / token_s(program, row.model, row.num_macs, row.tokens)
    if row.first:
        return (row.tokens - row.first) / chunk_s(program, row.model, row.first, row.tokens)
    return row.tokens / prompt_s(program, row.model, row.num_macs, row.tokens)


@cache
def common_factor() -> float:
    """Return the factor on every computed time: the median of published time over computed time."""
    return statistics.median(computed_rate(row) / row.rate for row in PUBLISHED)


def errors() -> list[tuple[Published, float, float]]:
    """Return each published figure, its computed rate with the common factor, and the relative error of that rate."""
    rates = [(row, computed_rate(row) / common_factor()) for row in PUBLISHED]
    return [(row, rate, rate / row.rate - 1) for row, rate in rates]


def decode_rate(
    program: Program, num_macs: int, context: int, mac: Mac = M3_ULTRA, acceptance_rate: float = 0.0
) -> float:
    """Return the predicted tokens per second of one stream, with ``num_macs`` - 1 n-gram drafts after each token.

    A draft token is accepted with ``acceptance_rate``, if all before it are accepted.
    """
    tokens_per_round = sum(acceptance_rate**num_drafts for num_drafts in range(num_macs))
    return tokens_per_round / token_s(program, "K2", num_macs, context, mac) / common_factor()


def head_rate(program: Program, num_macs: int, context: int, mac: Mac, acceptance_rate: float) -> float:
    """Return the predicted tokens per second of one stream with a draft head, right with ``acceptance_rate``.

    A token after a right draft takes a cycle: the time of all stages and of ``num_macs`` - 1 drafts, divided by
    ``num_macs``. A token after a wrong draft takes the time of all stages.
    """
    all_stages_s = token_s(program, "K2", num_macs, context, mac)
    read_s = DRAFT_HEAD_BYTES / (constant("dense bandwidth") * mac.bandwidth)
    cycle_s = (all_stages_s + (num_macs - 1) * (read_s + DRAFT_HEAD_LAUNCHES * constant("launch"))) / num_macs
    return 1 / (acceptance_rate * cycle_s + (1 - acceptance_rate) * all_stages_s) / common_factor()


def prefill_rate(program: Program, num_macs: int, tokens: int, mac: Mac = M3_ULTRA) -> float:
    """Return the predicted tokens per second of a prompt."""
    return tokens / best_prompt(program, num_macs, tokens, mac) / common_factor()


def comparison() -> Iterator[str]:
    """Yield the lines of a table of mlx-k2 before and after its settings, on two M3 Ultras."""
    yield "| context | bits | decode before | decode after | prefill before | prefill after |"
    yield "|---|---|---|---|---|---|"
    for context in CONTEXTS:
        for bits, name in DENSE_BITS:
            decode = [decode_rate(program, 2, context) for program in (before(bits), after(bits))]
            prefill = [prefill_rate(program, 2, context) for program in (before(bits), after(bits))]
            cells = (f"{decode[0]:.1f}", f"{decode[1]:.1f}", f"{prefill[0]:.0f}", f"{prefill[1]:.0f}")
            yield f"| {context} | {name} | {' | '.join(cells)} |"


def predictions() -> Iterator[str]:
    """Yield the lines of a table of predictions for 2 to 4 Macs of two chips."""
    yield "| Macs | bits | context | decode | with drafts, half accepted | 80% accepted | prefill |"
    yield "|---|---|---|---|---|---|---|"
    for mac in (M3_ULTRA, M5_ULTRA):
        for num_macs in (2, 3, 4):
            is_large_enough = num_macs * mac.memory_gb * USABLE_MEMORY > MODEL_GB
            memory_limit = "" if is_large_enough else f" (more than {mac.memory_gb} GB each)"
            for bits, name in DENSE_BITS:
                program = after(bits, mac)
                for context in CONTEXTS:
                    rates = [decode_rate(program, num_macs, context, mac, acceptance) for acceptance in (0.0, 0.5, 0.8)]
                    cells = " | ".join(f"{rate:.1f}" for rate in rates)
                    prefill = prefill_rate(program, num_macs, context, mac)
                    yield f"| {num_macs} {mac.name}{memory_limit} | {name} | {context} | {cells} | {prefill:.0f} |"


def head_predictions() -> Iterator[str]:
    """Yield the lines of a table of predicted tokens per second with a draft head, on M3 Ultras."""
    acceptance_rates = (0.5, 0.64, 0.72, 0.8, 0.853, 0.9, 1.0)
    yield f"| Macs | bits | no drafts | {' | '.join(f'{rate:g} accepted' for rate in acceptance_rates)} |"
    yield f"|---|---|---|{'---|' * len(acceptance_rates)}"
    for num_macs in (2, 3, 4):
        for bits, name in DENSE_BITS:
            program = after(bits)
            rates = [head_rate(program, num_macs, CONTEXTS[0], M3_ULTRA, rate) for rate in acceptance_rates]
            cells = " | ".join(f"{rate:.1f}" for rate in rates)
            yield f"| {num_macs} | {name} | {decode_rate(program, num_macs, CONTEXTS[0]):.1f} | {cells} |"


def readme_part() -> str:
    """Return the generated part of bench/README.md: the model's accuracy, and its predictions for two M3 Ultras."""
    close = f"{num_close()} of {len(PUBLISHED)}"
    lines = [
        "Computed, not measured: tokens per second on two M3 Ultras, with MLX's own settings (before) and the ones",
        f"that a stage sets (after). The model is within {CLOSE_ERROR:.0%} of {close} published figures of",
        "other programs (`python -m bench.mac_model` names all).",
        "",
        *comparison(),
    ]
    return "\n".join(lines)


def num_close() -> int:
    """Return the number of published figures from which the model is at most CLOSE_ERROR off."""
    return sum(abs(error) <= CLOSE_ERROR for _, _, error in errors())


def main() -> None:
    """Print the tables; with --readme write the table of bench/README.md instead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="write the table of bench/README.md")
    if parser.parse_args().readme:
        readme = ROOT / "bench" / "README.md"
        readme.write_text(replace_generated(readme.read_text(), MADE_BY, readme_part()))
        return
    for name, (value, unit, kind, source) in CONSTANTS.items():
        print(f"{name}: {value:g} {unit} ({kind}: {source})")
    print(f"common factor on every time: {common_factor():.3f}\n")
    for row, rate, error in errors():
        mark = "" if abs(error) <= CLOSE_ERROR else f"  <-- more than {CLOSE_ERROR:.0%} off"
        setting = f"{row.program}, {row.model} {row.expert_bits}/{row.dense_bits} bits, {row.num_macs} Mac, {row.kind}"
        rates = f"published {row.rate:.1f}, computed {rate:.1f} ({error:+.0%})"
        print(f"{setting} at {row.tokens}: {rates}; {row.source}{mark}")
    print(f"{num_close()} of {len(PUBLISHED)} published figures within {CLOSE_ERROR:.0%}\n")
    print("\n".join((*comparison(), "", *predictions())))
    print(f"\nComputed, not measured: tokens per second with a draft head, M3 Ultras, at {CONTEXTS[0]} tokens")
    print("\n".join(head_predictions()))


if __name__ == "__main__":
    main()
