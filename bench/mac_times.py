"""Times of a token and of a prompt on Macs, computed from launches, command buffers, bytes and operations.

A token reads its weights once, launch after launch. A launch that depends on the launch before costs a fixed time; a
command buffer costs another. A prompt computes its chunks one after the other on each stage. Routed experts compute
full tiles (mlx_k2/scheduling/cost_model.py). Attention of a chunk computes all pairs of its queries and the keys up to
its end. The times lack the common factor of bench/mac_model.py.
"""

from dataclasses import dataclass
from functools import cache

from bench.graph_launches import k2_config
from bench.mac_constants import CONSTANTS
from mlx_k2.config import ModelConfig
from mlx_k2.deployment.stage_costs import stage_sizes
from mlx_k2.scheduling.cost_model import StageSizes, expected_tiles, pipeline_s

PROMPT_CHUNK = 2048  # mlx-lm's prefill_step_size
UNSHARDED_BYTES = 2 * 7168 * (1536 + 576) * 61  # q_a and kv_a of all layers, which every rank of mlx-lm computes whole


def constant(name: str) -> float:
    """Return a constant's value."""
    return CONSTANTS[name].value


@dataclass(frozen=True)
class Program:
    """A program with its weights' formats, its launches and command buffers per token, and its way to run a prompt."""

    name: str
    expert_bits: float
    dense_bits: float
    launches_per_layer: int
    buffers: int
    """Command buffers of a token; 0 for a program that is not MLX."""
    expert_bandwidth: str = "expert bandwidth"
    expanded_cache: bool = False
    """True if the cache holds keys and values of each head instead of latents."""
    all_reduces: bool = False
    """True if each layer is divided over the Macs, with two all-reduces; False if each Mac has whole layers."""
    tile_rows: int = 16
    prompt_factor: float = 1.0
    fused: str = "none"
    """Chunks of a prompt whose attention is MLX's fused kernel: "none", "first" or "all"."""
    chunk: int = PROMPT_CHUNK


@dataclass(frozen=True)
class Mac:
    """A chip. ``bandwidth`` and ``operations`` are factors on those of an M3 Ultra."""

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
    """Return the bytes of all weights except routed experts and embedding."""
    return (sizes(model).dense_bytes + sizes(model).head_bytes) * bits / 16


def token_s(program: Program, model: str, num_macs: int, context: int, mac: Mac = M3_ULTRA) -> float:
    """Return the seconds of one token of one stream on ``num_macs`` Macs."""
    layers = config(model).num_hidden_layers
    reading_s = weights_s(program, model, mac) + attention_s(program, model, context, mac)
    fixed_s = layers * program.launches_per_layer * constant("launch") + program.buffers * constant("command buffer")
    if not program.all_reduces:
        return reading_s + fixed_s + (num_macs - 1) * constant("hop") + constant("Python")
    unsharded_bytes = (sizes(model).head_bytes + UNSHARDED_BYTES) * program.dense_bits / 16
    unsharded_s = unsharded_bytes / constant("dense bandwidth") / mac.bandwidth
    sharded_s = (reading_s - unsharded_s) / num_macs
    return unsharded_s + sharded_s + fixed_s + 2 * layers * constant("all-reduce") + constant("Python")


def weights_s(program: Program, model: str, mac: Mac) -> float:
    """Return the seconds in which one token's weights are read."""
    shape = sizes(model)
    expert_bytes = shape.expert_bytes * shape.experts_per_token * program.expert_bits / 4.5
    experts_s = expert_bytes / constant(program.expert_bandwidth)
    return (experts_s + dense_bytes(model, program.dense_bits) / constant("dense bandwidth")) / mac.bandwidth


def attention_s(program: Program, model: str, context: int, mac: Mac) -> float:
    """Return the seconds of attention for one token: those of its operations or of the cache's bytes, if more."""
    cache_s = sizes(model).position_bytes * context / constant("dense bandwidth") / mac.bandwidth
    if program.expanded_cache:
        return cache_s * _expansion(model)
    return max(cache_s, sizes(model).absorbed_operations * context / constant("dense operations") / mac.operations)


def chunk_s(program: Program, model: str, first: int, end: int, mac: Mac = M3_ULTRA) -> float:
    """Return the seconds of the chunk from position ``first`` to ``end`` on one Mac with all layers."""
    shape, count = sizes(model), end - first
    expert_speed = constant("expert operations") * program.prompt_factor
    tiles = expected_tiles(shape.num_experts, shape.experts_per_token, count, program.tile_rows)
    experts_s = tiles * program.tile_rows * shape.operations_per_expert_token / expert_speed / mac.operations
    expert_bytes = shape.expert_bytes * shape.num_experts * program.expert_bits / 4.5
    experts_read_s = expert_bytes / constant("dense bandwidth") / mac.bandwidth
    dense_s = (shape.operations_per_token * count + shape.rebuild_operations * end) / constant("dense operations")
    pairs = count * end
    num_scores = pairs * config(model).num_attention_heads * config(model).num_hidden_layers
    products_s = shape.naive_operations * pairs / constant("dense operations") / mac.operations
    chunk_attention_s = (
        products_s + num_scores * constant("score traffic") / constant("dense bandwidth") / mac.bandwidth
    )
    if program.fused == "all" or (program.fused == "first" and first == 0):
        qk_head_dim, v_head_dim = config(model).qk_head_dim, config(model).v_head_dim
        width = 2 * qk_head_dim / (qk_head_dim + v_head_dim)  # the kernel pads values to the width of keys
        causal = (first + end) / 2 / end  # the kernel skips keys after the last query of a tile
        chunk_attention_s = shape.naive_operations * width * pairs * causal / constant("fused attention")
    return max(experts_s, experts_read_s) + dense_s / mac.operations + chunk_attention_s


def _expansion(model: str) -> float:
    """Return the bytes of the keys and values of all heads, divided by those of the latents."""
    shape = config(model)
    return shape.num_attention_heads * (shape.qk_head_dim + shape.v_head_dim) / shape.cache_row_dim


def prompt_s(program: Program, model: str, num_macs: int, tokens: int, mac: Mac = M3_ULTRA) -> float:
    """Return the seconds of a prompt whose layers are divided evenly over ``num_macs`` Macs."""
    starts = range(0, tokens, program.chunk)
    chunk_times_s = [chunk_s(program, model, start, min(tokens, start + program.chunk), mac) for start in starts]
    return pipeline_s([[time_s / num_macs] * num_macs for time_s in chunk_times_s])
