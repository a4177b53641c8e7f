"""Deployment plan: assigns the model's layers to stages on the hosts. Pure; starts nothing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from mlx_k2.cluster.hostfile import Host, Hostfile
from mlx_k2.cluster.memory import (
    BLOCKS_AT_A_TIME,
    added_block_bytes,
    attention_block_bytes,
    layer_cache_bytes,
    memory_bound_bytes,
    working_bytes,
)
from mlx_k2.cluster.partition import (
    HostCapacity,
    LayerCost,
    ModelCosts,
    StageAssignment,
    divide_as_requested,
    divide_layers,
)
from mlx_k2.config import ModelConfig
from mlx_k2.deployment.cluster_options import ClusterOptions
from mlx_k2.errors import RequestError, StageStartError
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.draft_head import DraftDescription, stage_specs
from mlx_k2.weights.inventory import (
    TensorSpec,
    embedding_read_bytes_per_token,
    embedding_specs,
    group_size,
    head_specs,
    held_bytes,
    layer_read_bytes_per_token,
    layer_specs,
)
from mlx_k2.weights.model_source import DraftHead

DEFAULT_CONTEXT_TOKENS = 32768
GPU_CHUNK_TOKENS = 4096
"""Each expert of K2 then gets 85 tokens on average, which fill 84% of its tiles of 32 rows (calculated)."""
CPU_CHUNK_TOKENS = 128

CAREFUL_BITS = 8  # fewer bits per weight than this for dense matrices cause a warning

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class HostMemory:
    """Memory of one host; None: not known yet. ``working_set_bytes``, the GPU's limit, is also None without a GPU."""

    working_set_bytes: int | None
    ram_bytes: int | None
    other_bytes: int = 0
    """Memory that stages of other commands hold."""


@dataclass(frozen=True)
class RunShape:
    """Parameters for running a model, apart from its hosts."""

    dtype: str
    context_tokens: int
    num_slots: int
    chunk_tokens: int
    dense_bits: int | None = None
    """Bits per weight of attention, shared experts, dense layers and head. None keeps the checkpoint's format."""
    on_gpu: bool = False
    """Whether every stage computes on a GPU."""


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage: its host, its layers, its bytes and its files.

    ``needed_bytes`` is the sum of shard, cache and working memory. ``block_bytes`` is the limit of a block of
    attention; the working memory includes two blocks.
    """

    rank: int
    host: Host
    assignment: StageAssignment
    shard_bytes: int
    needed_bytes: int
    block_bytes: int
    files: tuple[str, ...]
    limit_bytes: int | None = None
    """The memory that the stage may use; None if it is not known yet."""


def choose_shape(config: ModelConfig, options: ClusterOptions, num_slots: int, all_on_gpu: bool) -> RunShape:
    """Return the shape of a run. The defaults of dtype and chunk depend on whether all stages have a GPU.

    Raises:
        RequestError: the context is larger than the model's.
    """
    longest, context_tokens = config.max_position_embeddings, options.context_tokens
    if context_tokens is not None and context_tokens > longest:
        raise RequestError(f"--context {context_tokens} is more than the {longest} positions that the model supports")
    return RunShape(
        dtype=options.dtype or ("bfloat16" if all_on_gpu else "float32"),
        context_tokens=context_tokens or min(DEFAULT_CONTEXT_TOKENS, longest),
        num_slots=num_slots,
        chunk_tokens=GPU_CHUNK_TOKENS if all_on_gpu else CPU_CHUNK_TOKENS,
        dense_bits=options.dense_bits,
        on_gpu=all_on_gpu,
    )


def quantization_warnings(config: ModelConfig, dense_bits: int | None) -> tuple[str, ...]:
    """Return the warnings for the user about ``dense_bits``."""
    if dense_bits is None:
        return ()
    few_bits = f"--dense-bits {dense_bits} may show in the answers: {CAREFUL_BITS} stays closer to the checkpoint"
    warnings = [few_bits] if dense_bits < CAREFUL_BITS else []
    specs = [spec for part in _distinct_parts(config) for spec in part]
    # A matrix has the name of its module: of "model.layers.0.self_attn.q_a_proj.weight" it is q_a_proj.
    matrices = {(spec.name.split(".")[-2], matrix.inputs) for spec in specs for matrix in spec.matrices}
    for group, description in ((32, "in groups of 32"), (None, "unquantized")):
        names = sorted(f"{name} ({inputs} inputs)" for name, inputs in matrices if group_size(inputs) == group)
        if names:
            warnings.append(f"not quantized in groups of 64 but held {description}: {', '.join(names)}")
    return tuple(warnings)


def plan_stages(
    model: ModelDescription,
    hostfile: Hostfile,
    memories: Sequence[HostMemory],
    split: Sequence[int] | None,
    shape: RunShape,
    head: DraftHead | None = None,
) -> tuple[StagePlan, ...]:
    """Divide the model's layers, and with ``head`` its draft head, over the hosts: by ``split`` or for speed.

    Raises:
        PartitionError: there is no such split, or it does not fit.
    """
    config, compute_bytes = model.config, DTYPE_BYTES[shape.dtype]
    draft = None if head is None else model.draft
    parts = _distinct_parts(config) + ([] if draft is None else [draft.aux_specs(), draft.layer_specs()])
    largest_bytes = max(held_bytes(part, compute_bytes) for part in parts)  # unquantized, as it is read
    block_bytes = attention_block_bytes(config, shape.context_tokens, compute_bytes, on_gpu=shape.on_gpu)
    temporary_bytes = working_bytes(
        config, shape.chunk_tokens, compute_bytes, largest_bytes, block_bytes=block_bytes, on_gpu=shape.on_gpu
    )
    costs = _model_costs(config, shape, compute_bytes)
    if head is not None and draft is not None:
        costs = _add_draft(costs, draft, head.bits, shape, compute_bytes)
    capacities = _capacities(hostfile.hosts, memories, temporary_bytes)
    assignments = divide_layers(costs, capacities) if split is None else divide_as_requested(costs, capacities, split)
    cache_bytes = layer_cache_bytes(config, shape.num_slots, shape.context_tokens, compute_bytes)
    draft_cache_bytes = 0 if draft is None else _draft_cache_bytes(draft, shape, compute_bytes)
    plans = []
    for rank, (host, capacity, assignment) in enumerate(zip(hostfile.hosts, capacities, assignments, strict=True)):
        spare_bytes = 0 if capacity.memory_bytes is None else capacity.memory_bytes - assignment.held_bytes
        added_bytes = added_block_bytes(block_bytes, spare_bytes) if shape.on_gpu else 0
        is_last = assignment.end_layer == config.num_hidden_layers
        caches_bytes = assignment.num_layers * cache_bytes + (draft_cache_bytes if is_last else 0)
        plan = StagePlan(
            rank=rank,
            host=host,
            assignment=assignment,
            shard_bytes=assignment.held_bytes - caches_bytes,
            needed_bytes=assignment.held_bytes + temporary_bytes + BLOCKS_AT_A_TIME * added_bytes,
            block_bytes=block_bytes + added_bytes,
            files=tuple(model.index.files(stage_specs(config, assignment.first_layer, assignment.end_layer, draft))),
            limit_bytes=None if capacity.memory_bytes is None else capacity.memory_bytes + temporary_bytes,
        )
        plans.append(plan)
    return tuple(plans)


def check_fit(plans: Sequence[StagePlan], memories: Sequence[HostMemory]) -> None:
    """Check that stages that are started again still fit their hosts, by the memory that the hosts report now.

    Raises:
        StageStartError: a host has less memory than its stage needs; names both.
    """
    hosts = [plan.host for plan in plans]
    capacities = _capacities(hosts, memories, temporary_bytes=0)  # needed_bytes includes the working memory
    for plan, capacity in zip(plans, capacities, strict=True):
        if capacity.memory_bytes is not None and plan.needed_bytes > capacity.memory_bytes:
            raise StageStartError(
                f"stage {plan.rank} on {plan.host.ssh} had {plan.needed_bytes / 1e9:.1f} GB before the fault, and its "
                f"host now allows {capacity.memory_bytes / 1e9:.1f} GB: check whether the host was restarted with "
                "another iogpu.wired_limit_mb",
                plan.rank,
            )


def _model_costs(config: ModelConfig, shape: RunShape, compute_bytes: int) -> ModelCosts:
    """Return the costs of the model without a draft head."""
    cache_bytes = layer_cache_bytes(config, shape.num_slots, shape.context_tokens, compute_bytes)
    bits = shape.dense_bits
    head_bytes = held_bytes(head_specs(config), compute_bytes, bits)  # a token reads all of it
    cost_by_kind = {
        config.is_moe(layer): LayerCost(
            held_bytes(layer_specs(config, layer), compute_bytes, bits) + cache_bytes,
            layer_read_bytes_per_token(config, layer, compute_bytes, bits),
        )
        for layer in _distinct_layers(config)
    }
    return ModelCosts(
        embedding=LayerCost(
            held_bytes(embedding_specs(config), compute_bytes), embedding_read_bytes_per_token(config, compute_bytes)
        ),
        layers=tuple(cost_by_kind[config.is_moe(layer)] for layer in range(config.num_hidden_layers)),
        head=LayerCost(head_bytes, head_bytes),
    )


def _add_draft(
    costs: ModelCosts, draft: DraftDescription, bits: int | None, shape: RunShape, compute_bytes: int
) -> ModelCosts:
    """Add a draft head: a slice of its projection ``fc`` to each layer whose output it reads, the rest to the head.

    Slices and draft head are read for each token, as if drafts were made after every token.
    """
    slice_bytes = draft.slice_bytes(compute_bytes, bits)
    layers = list(costs.layers)
    for layer in draft.aux_layers:
        layers[layer] += LayerCost(slice_bytes, slice_bytes)
    layer_bytes, projection_bytes = draft.layer_bytes(compute_bytes, bits), draft.projection_bytes(compute_bytes, bits)
    cache_bytes = _draft_cache_bytes(draft, shape, compute_bytes)
    held = layer_bytes + projection_bytes + cache_bytes + draft.embedding_bytes(compute_bytes)
    read = layer_bytes + (projection_bytes or costs.head.read_bytes)  # 0: the draft head uses the target's projection
    return msgspec.structs.replace(costs, layers=tuple(layers), head=costs.head + LayerCost(held, read))


def _draft_cache_bytes(draft: DraftDescription, shape: RunShape, compute_bytes: int) -> int:
    return layer_cache_bytes(draft.layer, shape.num_slots, shape.context_tokens, compute_bytes)


def _distinct_parts(config: ModelConfig) -> list[tuple[TensorSpec, ...]]:
    """Return the tensors of the head and of one layer of each kind."""
    return [head_specs(config), *(layer_specs(config, layer) for layer in _distinct_layers(config))]


def _distinct_layers(config: ModelConfig) -> tuple[int, ...]:
    """Return the number of one layer of each kind (dense, MoE). All layers of a kind have the same size."""
    return tuple({config.is_moe(layer): layer for layer in range(config.num_hidden_layers)}.values())


def _capacities(
    hosts: Sequence[Host], memories: Sequence[HostMemory], temporary_bytes: int
) -> tuple[HostCapacity, ...]:
    """Return the memory for each stage beside ``temporary_bytes``. Stages on one machine share its memory evenly."""
    num_stages_on = Counter(host.ssh for host in hosts)
    capacities = []
    for host, memory in zip(hosts, memories, strict=True):
        bound = memory_bound_bytes(host.memory_gb, memory.working_set_bytes, memory.ram_bytes, memory.other_bytes)
        available_bytes = None if bound is None else max(0, bound // num_stages_on[host.ssh] - temporary_bytes)
        capacities.append(HostCapacity(name=host.ssh, memory_bytes=available_bytes, gb_per_s=host.gb_per_s))
    return tuple(capacities)
