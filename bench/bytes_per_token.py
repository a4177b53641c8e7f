"""Bytes that one decoded token of Kimi K2 Thinking reads, and the tokens per second that memory bandwidth allows.

python -m bench.bytes_per_token [--save]

All figures are calculated from tensor shapes; nothing is measured. The tokens per second are an upper bound, not a
speed. A pipeline of stages has the same bound as one machine. "launches" are the kernel dispatches of all feed-forward
blocks with routed experts (MoE blocks), counted in MLX's graphs. --save appends to results/bytes_per_token.csv.
"""

import argparse
import json
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
from mlx import nn
from mlx_lm.models.deepseek_v3 import DeepseekV3MoE, ModelArgs

from bench.graph_dispatches import count_dispatches, kernel_in_graph
from bench.measure import save_rows
from mlx_k2.config import ModelConfig
from mlx_k2.kernels import variants
from mlx_k2.kernels.reference import RouterRule
from mlx_k2.kernels.self_check import LayerShape, random_stack
from mlx_k2.kernels.tuning import DEFAULT
from mlx_k2.model.decoder_layer import swiglu
from mlx_k2.model.layer_weights import DenseWeights
from mlx_k2.weights.inventory import (
    embedding_read_bytes_per_token,
    head_specs,
    held_bytes,
    layer_read_bytes_per_token,
    model_specs,
)
from mlx_k2.weights.known_layout import thinking_config_fields

BANDWIDTHS_GB_S = (819, 692)  # of an M3 Ultra: nominal, best read published
HEADER = (
    "program",
    "dense bits",
    "GB held",
    "GB a token",
    *(f"tokens/s at {bandwidth} GB/s" for bandwidth in BANDWIDTHS_GB_S),
    "launches in MoE blocks",
)


class ProgramFigures(NamedTuple):
    """Figures of one program with one format of its dense weights. ``dense_bits`` is None for bfloat16, as shipped."""

    program: str
    dense_bits: int | None
    bytes_held: int
    bytes_per_token: int
    dispatches: int

    def cells(self) -> tuple[object, ...]:
        """Return the cells of the table's row, as HEADER names them."""
        max_rates = (f"{speed * 1e9 / self.bytes_per_token:.2f}" for speed in BANDWIDTHS_GB_S)
        gigabytes = (f"{count / 1e9:.2f}" for count in (self.bytes_held, self.bytes_per_token))
        return self.program, self.dense_bits or 16, *gigabytes, *max_rates, self.dispatches


def main() -> None:
    """Print the table; with --save append its rows to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/bytes_per_token.csv")
    save = parser.parse_args().save
    rows = [row.cells() for row in table()]
    for cells in (HEADER, *rows):
        print(" | ".join(str(cell) for cell in cells))
    if save:
        print(f"saved to {save_rows('bytes_per_token', HEADER, rows)}")


def table() -> list[ProgramFigures]:
    """Return the figures of mlx-k2 and mlx-lm, with the dense weights as shipped and in 8 bits."""
    config = ModelConfig.from_json(json.dumps(thinking_config_fields()).encode(), "Kimi K2 Thinking")
    moe_layers = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    ours, theirs = moe_layers * our_dispatches(config), moe_layers * mlx_lm_dispatches(config)
    return [
        ProgramFigures(program, bits, *bytes_held_and_read(config, bits, stored_biases=biases), dispatches)
        for bits in (None, 8)
        for program, biases, dispatches in (("mlx-k2", False, ours), ("mlx-lm", True, theirs))
    ]


def bytes_held_and_read(config: ModelConfig, dense_bits: int | None, *, stored_biases: bool) -> tuple[int, int]:
    """Return the bytes of the weights in memory, and the bytes of the weights that one token reads.

    Of the routed experts a token reads only the chosen ones, and of the embedding one row. With `stored_biases` each
    scale of a routed expert has a bias of the same size, as in MLX's own layers.
    """
    specs = model_specs(config)
    biases = sum(spec.num_bytes for spec in specs if spec.name.endswith("weight_scale")) if stored_biases else 0
    held = held_bytes(specs, dense_bits=dense_bits) + biases
    layers = sum(
        layer_read_bytes_per_token(config, layer, dense_bits=dense_bits) for layer in range(config.num_hidden_layers)
    )
    embedding_and_head = embedding_read_bytes_per_token(config) + held_bytes(head_specs(config), dense_bits=dense_bits)
    return held, layers + embedding_and_head + biases * config.num_experts_per_tok // config.n_routed_experts


def our_dispatches(config: ModelConfig) -> int:
    """Return the dispatches of one MoE block of mlx-k2 for one token: router, routed experts, shared expert, sum."""
    shape = LayerShape(64, 32, config.num_experts_per_tok, mx.bfloat16)  # the count does not depend on sizes
    stack = random_stack(shape, 16)
    router, bias = mx.zeros((16, 64), mx.bfloat16), mx.zeros(16)
    gate, up, down = (mx.ones(shape, mx.bfloat16) for shape in ((64, 32), (64, 32), (32, 64)))
    shared = DenseWeights(gate, up, down)
    x = mx.zeros((1, 64), mx.bfloat16)
    mx.eval(stack, router, bias, gate, up, down, x)

    rule = RouterRule(config.num_experts_per_tok, config.norm_topk_prob, config.routed_scaling_factor)

    def block(x: mx.array) -> mx.array:
        ids, weights = variants.route(x, router, bias, rule, kernel_in_graph)
        return variants.decode_experts(x, ids, weights, stack, DEFAULT, kernel_in_graph) + swiglu(x, shared)

    return sum(count_dispatches(mx.compile(block), x).values())


def mlx_lm_dispatches(config: ModelConfig) -> int:
    """Return the dispatches of one MoE block of mlx-lm for one token. mlx-lm compiles parts of it."""
    arguments = ModelArgs(
        hidden_size=64,
        moe_intermediate_size=32,
        n_routed_experts=16,
        n_shared_experts=config.n_shared_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        n_group=config.n_group,
        topk_group=config.topk_group,
        norm_topk_prob=config.norm_topk_prob,
        routed_scaling_factor=config.routed_scaling_factor,
    )
    block = DeepseekV3MoE(arguments)
    nn.quantize(block, group_size=32, bits=4, class_predicate=is_switch_linear)
    block.set_dtype(mx.bfloat16)
    x = mx.zeros((1, 1, 64), mx.bfloat16)
    mx.eval(block.parameters(), x)
    typed_block: Callable[[mx.array], mx.array] = block  # mlx has no type for a module's result
    return sum(count_dispatches(typed_block, x).values())


def is_switch_linear(path: str, module: nn.Module) -> bool:
    """Return True for the layers that mlx-lm keeps quantized when it loads a K2 checkpoint."""
    return path.startswith("switch_mlp.") and hasattr(module, "to_quantized")


if __name__ == "__main__":
    main()
