"""Loading of a stage's layers from the checkpoint, one layer at a time, for a Load message."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import mlx.core as mx
from mlx.utils import tree_reduce

from mlx_k2.cluster.memory import GPU_MIN_HEADS
from mlx_k2.config import ModelConfig
from mlx_k2.model.attention import ON_CPU, AttentionLimits
from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.model.layer_weights import LayerWeights, assemble_layer
from mlx_k2.model.linear import make_matrix
from mlx_k2.model.stage_model import FeatureSlice, Head, StageModel
from mlx_k2.protocol.messages import LayerLoaded, Load, Loaded, Prepare
from mlx_k2.stage.draft_loading import DraftLoader
from mlx_k2.stage.draft_plans import DraftPlans
from mlx_k2.stage.drafting import Drafting
from mlx_k2.stage.host import check_memory, on_gpu, peak_bytes, wire_memory
from mlx_k2.stage.kernel_checks import check_kernels
from mlx_k2.stage.mlx_settings import chip_name, is_before_m5
from mlx_k2.stage.step_runner import PlanLimits, StepRunner
from mlx_k2.stage.transport import Transport
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.draft_head import stage_specs
from mlx_k2.weights.manifest import identify
from mlx_k2.weights.model_files import locate_shard, read_draft
from mlx_k2.weights.reader import ShardReader


def load_stage_model(
    config: ModelConfig,
    reader: ShardReader,
    layers: range,
    cache: LatentCache,
    on_part: Callable[[LayerLoaded], None],
    dense_bits: int | None = None,
    attention_limits: AttentionLimits = ON_CPU,
    feature_slices: Mapping[int, FeatureSlice] = MappingProxyType({}),
) -> StageModel:
    """Load the model of ``layers``, with the embedding if they are the first ones and the head if they are the last.

    ``on_part`` is called for embedding, each layer and head as soon as it is in memory. With ``dense_bits`` the dense
    matrices of a layer are quantized before the next layer is read.
    """
    embedding = head = None
    if layers.start == 0:
        loaded = reader.embedding()
        embedding = loaded.tensors["model.embed_tokens.weight"]
        on_part(_evaluate(embedding, loaded.tensor_names))
    weights = []
    for layer in layers:
        layer_weights, message = _load_layer(config, reader, layer, dense_bits)
        weights.append(layer_weights)
        on_part(message)
    if layers.stop == config.num_hidden_layers:
        head, message = _load_head(reader, dense_bits)
        on_part(message)
    return StageModel(config, weights, embedding, head, cache, attention_limits, feature_slices)


def _load_layer(
    config: ModelConfig, reader: ShardReader, layer: int, dense_bits: int | None
) -> tuple[LayerWeights, LayerLoaded]:
    loaded = reader.layer(layer)
    weights = assemble_layer(config, layer, loaded.tensors, dense_bits)
    return weights, _evaluate(weights, loaded.tensor_names)


def _load_head(reader: ShardReader, dense_bits: int | None) -> tuple[Head, LayerLoaded]:
    loaded = reader.head()
    head = Head(loaded.tensors["model.norm.weight"], make_matrix(loaded.tensors["lm_head.weight"], dense_bits))
    return head, _evaluate(head, loaded.tensor_names)


def _evaluate(weights: Any, tensor_names: tuple[str, ...] = ()) -> LayerLoaded:
    """Evaluate ``weights``, a tree of arrays, so that the arrays they were made of can be freed.

    Return the message with their bytes and the names of the checkpoint's tensors in them.
    """
    mx.eval(weights)
    mx.clear_cache()
    held_bytes: int = tree_reduce(lambda total, leaf: total + _num_bytes(leaf), weights, 0)
    return LayerLoaded(tensor_names, held_bytes)


def _num_bytes(leaf: mx.array | int | None) -> int:
    """Return an array's bytes, and 0 for the numbers of a quantized matrix and for None."""
    return leaf.nbytes if isinstance(leaf, mx.array) else 0


def load_stage(
    description: ModelDescription,
    prepared: Prepare,
    message: Load,
    transport: Transport,
    on_layer: Callable[[LayerLoaded], None],
    on_download: Callable[[int, int], None],
) -> tuple[StepRunner, Loaded]:
    """Load the layers of ``message`` from the model of ``prepared``. Return their runner and the answer.

    ``on_layer`` is called for embedding, each layer, head and each part of the draft head as soon as it is in memory.
    ``on_download`` is called with (bytes done, bytes in total) while files are fetched from the Hub.

    Raises:
        CheckpointError, DownloadError: a file is missing, cannot be fetched, or has the wrong content.
        StageStartError: macOS does not allow the GPU as much memory as the stage needs.
    """
    held_bytes = 0

    def on_part(loaded: LayerLoaded) -> None:
        nonlocal held_bytes
        held_bytes += loaded.held_bytes
        on_layer(loaded)

    check_memory(message.needed_bytes)
    config, head = description.config, prepared.draft_head
    layers = range(message.first_layer, message.end_layer)
    dtype = getattr(mx, message.dtype)
    draft = None if head is None else read_draft(head, config).draft
    specs = stage_specs(config, layers.start, layers.stop, draft)
    files = locate_shard(prepared.model, description.index, specs, on_download)
    checksums = identify(set(files.values()))
    warnings = check_kernels(config, dtype)
    cache = LatentCache(len(layers), message.num_slots, message.context_tokens, config.cache_row_dim, dtype)
    check_all = message.check_weights or message.dense_bits is not None  # mx.quantize makes NaN a finite number
    reader = ShardReader(config, files, dtype, check_all=check_all)
    limits = ON_CPU
    if on_gpu():  # the fused kernel is used before the M5 only (docs/design/0103)
        limits = AttentionLimits(message.block_bytes, GPU_MIN_HEADS, fused=is_before_m5(chip_name()))
    draft_loader = None
    if head is not None and draft is not None:
        draft_files = locate_shard(head.source, draft.index, draft.specs(), on_download)
        draft_loader = DraftLoader(draft, head, reader, draft_files, dtype, lambda weights: on_part(_evaluate(weights)))
    slices = {} if draft_loader is None else draft_loader.feature_slices(layers)
    model = load_stage_model(config, reader, layers, cache, on_part, message.dense_bits, limits, slices)
    plans, drafting = DraftPlans(), None
    if draft_loader is not None and model.head is not None:
        draft_model = draft_loader.model(model.embedding, model.head, message.num_slots, message.context_tokens, limits)
        drafting = Drafting(draft_model, config.hidden_size, message.context_tokens, plans)
    wire_memory(message.needed_bytes)
    runner = StepRunner(
        model,
        transport,
        PlanLimits(message.num_slots, message.context_tokens, config.vocab_size),
        first_layer=layers.start,
        has_features=message.draft_head is not None,  # also on a stage that reads nothing of the head
        drafting=drafting,
        plans=plans,
    )
    return runner, Loaded(held_bytes, peak_bytes(), warnings, checksums)
