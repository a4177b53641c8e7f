"""List of the GPU launches of an expert layer of Kimi K2 for one token, and its command buffers in all expert layers.

python -m bench.graph_launches [--dense-bits 8]

The output has one line for each node of the layer's graph, in the order in which MLX runs them; a test compares it with
the graph itself. A node is one launch or two; the line of a node with two gives MLX's rule for it and the source file.
Command buffers are simulated by MLX's rule (mlx/backend/metal/device.cpp, CommandEncoder::needs_commit): a buffer ends
after the launch with which it exceeds one of two limits: launches, or elements of the arrays that they read, in units
of 2^20. Nothing is measured.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mlx_k2.config import ModelConfig
from mlx_k2.stage.mlx_settings import LONG_BUFFERS, BufferLimits
from mlx_k2.weights.known_layout import thinking_config_fields

MLX_LIMITS = BufferLimits(50, 50)
"""MLX's own limits on a Max or an Ultra chip (device.cpp)."""
_CONCATENATE = "one copy for each input: mlx/backend/gpu/slicing.cpp, concatenate_gpu"


class LayerNode(NamedTuple):
    """A node of the graph, with the shapes of the large weights that it reads: norms, biases and activations are small.

    ``matrices`` are dense matrices, which dense bits quantize. ``arrays`` are other weights, and the cache at its first
    use in the layer: MLX counts an array once for a command buffer.
    """

    name: str
    primitive: str
    num_launches: int = 1
    matrices: tuple[tuple[int, ...], ...] = ()
    arrays: tuple[tuple[int, ...], ...] = ()
    rule: str = ""


def expert_layer(config: ModelConfig, cache_rows: int = 8192) -> tuple[LayerNode, ...]:
    """Return the nodes of one expert layer for one generated token, in the order of its graph."""
    hidden, heads, query_rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    assert query_rank is not None
    latent, nope, value = config.kv_lora_rank, config.qk_nope_head_dim, config.v_head_dim
    experts, inner = config.n_routed_experts, config.moe_intermediate_size
    up_arrays = ((experts, inner, hidden // 8), (experts, inner, hidden // 32))  # packed weights, scales
    down_arrays = ((experts, hidden, inner // 8), (experts, hidden, inner // 32))
    cache = ((cache_rows, config.cache_row_dim),)
    return (
        LayerNode("input norm", "RMSNorm"),
        LayerNode("q_a", "Matmul", matrices=((hidden, query_rank),)),
        LayerNode("q_a norm", "RMSNorm"),
        LayerNode("q_b", "Matmul", matrices=((query_rank, heads * config.qk_head_dim),)),
        LayerNode("softmax scale", "CompiledBroadcastMultiply"),
        LayerNode(
            "keys up",
            "Matmul",
            num_launches=2,
            matrices=((heads, nope, latent),),
            rule="a vector with a stride is copied: mlx/backend/metal/matmul.cpp, check_transpose with is_vector",
        ),
        LayerNode("rope of the queries", "RoPE"),
        LayerNode("absorbed queries", "Concatenate", num_launches=2, rule=_CONCATENATE),
        LayerNode("kv_a", "Matmul", matrices=((hidden, config.cache_row_dim),)),
        LayerNode("kv_a norm", "RMSNorm"),
        LayerNode("rope of the key", "RoPE"),
        LayerNode("cache row", "Concatenate", num_launches=2, rule=_CONCATENATE),
        LayerNode("write to the cache", "SliceUpdate", arrays=cache, rule="in place, because the cache is donated"),
        LayerNode("scores", "Matmul"),
        LayerNode("softmax", "Softmax"),
        LayerNode(
            "latents",
            "Matmul",
            num_launches=2,
            rule="split along the keys, then summed: matmul.cpp, few output tiles and K >= max(M, N)",
        ),
        LayerNode("values up", "Matmul", matrices=((heads, latent, value),)),
        LayerNode("output", "Matmul", matrices=((heads * value, hidden),)),
        LayerNode("add", "Add"),
        LayerNode("post-attention norm", "RMSNorm"),
        LayerNode("router logits", "Kernel", arrays=((experts, hidden),)),
        LayerNode("router choice", "Kernel"),
        LayerNode("experts gate and up", "Kernel", arrays=up_arrays * 2),  # gate and up
        LayerNode("experts down", "Kernel", arrays=down_arrays),
        LayerNode("shared gate", "Matmul", matrices=((hidden, inner),)),
        LayerNode("shared up", "Matmul", matrices=((hidden, inner),)),
        LayerNode("silu and product", "CompiledSigmoidMultiplyMultiply"),
        LayerNode("shared down", "Matmul", matrices=((inner, hidden),)),
        LayerNode("add twice", "CompiledAddAdd"),
    )


def num_launches(nodes: Iterable[LayerNode]) -> int:
    """Return the number of GPU launches of the nodes."""
    return sum(node.num_launches for node in nodes)


def elements(node: LayerNode, dense_bits: int | None) -> int:
    """Return the elements of the weights and the cache that a node reads. Arrays are counted whole, as MLX does.

    A quantized matrix has words of 32 bits, and a scale and a bias for each group of 64 weights.
    """
    dense = sum(math.prod(shape) for shape in node.matrices)
    num_elements = dense if dense_bits is None else dense * dense_bits // 32 + 2 * dense // 64
    return num_elements + sum(math.prod(shape) for shape in node.arrays)


def command_buffers(sizes: Iterable[int], limits: BufferLimits) -> int:
    """Return the number of command buffers that MLX's rule ends. ``sizes`` are the elements that each launch reads."""
    assert limits.operations is not None and limits.megabytes is not None
    num_ended = num_launched = num_elements = 0
    for size in sizes:
        num_launched += 1
        num_elements += size
        # MLX's "megabytes" are 2^20 elements
        if num_launched > limits.operations or num_elements >> 20 > limits.megabytes:
            num_ended += 1
            num_launched = num_elements = 0
    return num_ended


def launch_sizes(config: ModelConfig, dense_bits: int | None) -> Iterator[int]:
    """Yield the elements that each launch of all expert layers reads for one token.

    The first launch of a node reads all its weights.
    """
    for _ in range(config.num_hidden_layers - config.first_k_dense_replace):
        for node in expert_layer(config):
            yield elements(node, dense_bits)
            yield from (0,) * (node.num_launches - 1)


def k2_config(**changes: int) -> ModelConfig:
    """Return Kimi K2 Thinking's configuration, with some fields replaced by ``changes``."""
    return ModelConfig.from_json(json.dumps(thinking_config_fields(**changes)).encode(), "Kimi K2 Thinking")


def main() -> None:
    """Print one line for each node, and the command buffers of a token's expert layers under several limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense-bits", type=int, choices=(4, 8), default=None, help="quantize the dense matrices")
    bits = parser.parse_args().dense_bits
    config = k2_config()
    layer = expert_layer(config)
    print("launches | node | MLX's primitive | millions of elements | rule")
    for node in layer:
        millions = f"{elements(node, bits) / 1e6:.1f}"
        print(f"{node.num_launches} | {node.name} | {node.primitive} | {millions} | {node.rule}")
    print(f"{num_launches(layer)} launches of {len(layer)} nodes in one expert layer")
    for limits in (MLX_LIMITS, BufferLimits(200, 200), BufferLimits(200, 1000), BufferLimits(1000, 4000), LONG_BUFFERS):
        count = command_buffers(launch_sizes(config, bits), limits)
        print(
            f"{count} command buffers for a token's expert layers with {limits.operations} launches or "
            f"{limits.megabytes} * 2^20 elements"
        )


if __name__ == "__main__":
    main()
