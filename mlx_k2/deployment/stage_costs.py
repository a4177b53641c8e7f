"""Bytes and operations of each stage, calculated from the model's shapes, and the stage's expected speed."""

import math
from collections.abc import Iterable
from dataclasses import replace

from mlx_k2.cluster.partition import StageAssignment
from mlx_k2.config import ModelConfig
from mlx_k2.deployment.plan import DTYPE_BYTES, RunShape, StagePlan
from mlx_k2.scheduling.cost_model import StageCost, StageSizes, StageSpeed
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.draft_head import DraftDescription
from mlx_k2.weights.inventory import INT4_PER_WORD, TensorSpec, head_specs, held_bytes, layer_specs
from mlx_k2.weights.model_source import DraftHead

GPU_SPEED = StageSpeed(fixed_s=0.003, bytes_per_s=600e9, operations_per_s=15e12)
"""Rough values of an M3 Ultra: bandwidth from published measurements, operations at half of the expected maximum."""
GPU_TILE_ROWS = 16
"""Rows of a tile in MLX's kernel for routed experts (gather_qmm_rhs). The prefill kernel of mlx-k2 has 32; which of the
two a stage uses is not known here."""
CPU_SPEED = StageSpeed(fixed_s=0.002, bytes_per_s=10e9, operations_per_s=3.6e9)
"""MLX on Linux: its reference BLAS reaches 3.6 GFLOP/s in float32 for any number of matrix rows (measured)."""


def stage_cost(
    model: ModelDescription, plan: StagePlan, shape: RunShape, head: DraftHead | None, *, on_gpu: bool
) -> StageCost:
    """Return one stage's sizes and its expected speed, which is used until its steps are measured.

    ``head`` is the draft head that is loaded beside the model.
    """
    config, layers, compute_bytes = model.config, plan.assignment, DTYPE_BYTES[shape.dtype]
    speed = GPU_SPEED if on_gpu else CPU_SPEED
    if plan.host.gb_per_s is not None:
        speed = replace(speed, bytes_per_s=plan.host.gb_per_s * 1e9)
    tile_rows = GPU_TILE_ROWS if on_gpu else 1
    sizes = stage_sizes(
        config, layers.first_layer, layers.end_layer, compute_bytes, shape.dense_bits, tile_rows=tile_rows
    )
    if head is not None and model.draft is not None:
        sizes = _add_draft(sizes, model.draft, layers, config.num_hidden_layers, compute_bytes, head.bits)
    return StageCost(sizes, speed)


def _add_draft(
    sizes: StageSizes,
    draft: DraftDescription,
    assignment: StageAssignment,
    num_layers: int,
    compute_bytes: int,
    bits: int | None,
) -> StageSizes:
    """Add a draft head: slices of its projection ``fc`` for each token, the rest for each draft on the last stage."""
    num_slices = sum(assignment.first_layer <= layer < assignment.end_layer for layer in draft.aux_layers)
    hidden = draft.layer.hidden_size
    sizes = replace(
        sizes,
        dense_bytes=sizes.dense_bytes + num_slices * draft.slice_bytes(compute_bytes, bits),
        operations_per_token=sizes.operations_per_token + 2 * num_slices * hidden**2,
    )
    if assignment.end_layer < num_layers:
        return sizes
    projection_bytes = draft.projection_bytes(compute_bytes, bits) or sizes.head_bytes  # 0: it uses the target's
    num_weights = _num_values(draft.layer_specs()) + draft.num_drafted_ids * hidden
    return replace(
        sizes,
        draft_bytes=draft.layer_bytes(compute_bytes, bits) + projection_bytes,
        draft_operations=2 * num_weights,
    )


def stage_sizes(
    config: ModelConfig,
    first_layer: int,
    end_layer: int,
    compute_bytes: int,
    dense_bits: int | None = None,
    *,
    tile_rows: int = 1,
) -> StageSizes:
    """Return the sizes of layers ``first_layer`` to ``end_layer`` - 1. The model's last layer also brings the head."""
    dense_bytes = dense_weights = routed_bytes = routed_weights = 0
    for is_moe in (False, True):
        layers = [layer for layer in range(first_layer, end_layer) if config.is_moe(layer) is is_moe]
        specs = layer_specs(config, layers[0]) if layers else ()  # all layers of one kind have the same shapes
        dense = [spec for spec in specs if not spec.is_routed_expert]
        routed = [spec for spec in specs if spec.is_routed_expert]
        packed = [spec for spec in routed if spec.name.endswith(".weight_packed")]
        dense_bytes += len(layers) * held_bytes(dense, compute_bytes, dense_bits)
        dense_weights += len(layers) * _num_values(dense)
        routed_bytes += len(layers) * held_bytes(routed, compute_bytes)
        routed_weights += len(layers) * INT4_PER_WORD * _num_values(packed)
    head = head_specs(config) if end_layer == config.num_hidden_layers else ()
    num_experts = config.n_routed_experts if routed_bytes else 0
    num_layers = end_layer - first_layer
    heads, key_dim, value_dim = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    return StageSizes(
        dense_bytes=dense_bytes,
        head_bytes=held_bytes(head, compute_bytes, dense_bits),
        expert_bytes=routed_bytes // num_experts if num_experts else 0,
        num_experts=num_experts,
        experts_per_token=config.num_experts_per_tok,
        position_bytes=num_layers * config.cache_row_dim * compute_bytes,
        operations_per_token=2 * dense_weights,
        operations_per_expert_token=2 * routed_weights // num_experts if num_experts else 0,
        operations_per_sampled_token=2 * _num_values(head),
        absorbed_operations=2 * num_layers * heads * (config.cache_row_dim + config.kv_lora_rank),
        naive_operations=2 * num_layers * heads * (config.qk_head_dim + value_dim),
        rebuild_operations=2 * num_layers * heads * (key_dim + value_dim) * config.kv_lora_rank,
        tile_rows=tile_rows,
    )


def _num_values(specs: Iterable[TensorSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in specs)
