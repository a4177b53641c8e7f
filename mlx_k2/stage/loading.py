"""Loading of a stage's layers from the checkpoint, one layer at a time, as a Load message asks for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_reduce

from mlx_k2.config import ModelConfig
from mlx_k2.kernels.experts import prepare
from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.model.layer_weights import LayerWeights, MoeWeights, assemble_layer
from mlx_k2.model.linear import make_matrix
from mlx_k2.model.stage_model import Head, StageModel
from mlx_k2.protocol.messages import Load, Loaded
from mlx_k2.stage.host import on_gpu, peak_bytes, wire_memory
from mlx_k2.stage.step_runner import PlanLimits, StepRunner
from mlx_k2.stage.transport import Transport
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.inventory import shard_specs
from mlx_k2.weights.model_files import locate_shard
from mlx_k2.weights.model_source import ModelSource
from mlx_k2.weights.reader import LoadedTensors, ShardReader


class LoadedPiece(NamedTuple):
    """The embedding, a layer or the head, in memory: the checkpoint's names that it was made of, and its bytes."""

    tensor_names: tuple[str, ...]
    held_bytes: int


class LoadedStage(NamedTuple):
    """A stage's model, and lines for the user about what is slower here than it could be."""

    model: StageModel
    warnings: tuple[str, ...]


def load_stage_model(
    config: ModelConfig,
    reader: ShardReader,
    layers: range,
    cache: LatentCache,
    on_piece: Callable[[LoadedPiece], None],
    dense_bits: int | None = None,
) -> LoadedStage:
    """The model of ``layers``, with the embedding if they are the first ones and the head if they are the last.

    ``on_piece`` is told of each piece as soon as it is in memory. With ``dense_bits`` the dense matrices of a piece are
    quantized before the next one is read.
    """
    embedding = head = None
    if layers.start == 0:
        piece = reader.embedding()
        embedding = piece.tensors["model.embed_tokens.weight"]
        on_piece(_hold(embedding, piece))
    weights = []
    for layer in layers:
        layer_weights, loaded = _load_layer(config, reader, layer, dense_bits)
        weights.append(layer_weights)
        on_piece(loaded)
    if layers.stop == config.num_hidden_layers:
        head, loaded = _load_head(reader, dense_bits)
        on_piece(loaded)
    model = StageModel(config, weights, embedding, head, cache, fused_attention=on_gpu())
    return LoadedStage(model, _check_kernels(config, weights, cache.dtype))


def _load_layer(
    config: ModelConfig, reader: ShardReader, layer: int, dense_bits: int | None
) -> tuple[LayerWeights, LoadedPiece]:
    piece = reader.layer(layer)
    weights = assemble_layer(config, layer, piece.tensors, dense_bits)
    return weights, _hold(weights, piece)


def _load_head(reader: ShardReader, dense_bits: int | None) -> tuple[Head, LoadedPiece]:
    piece = reader.head()
    head = Head(piece.tensors["model.norm.weight"], make_matrix(piece.tensors["lm_head.weight"], dense_bits))
    return head, _hold(head, piece)


def _hold(weights: Any, piece: LoadedTensors) -> LoadedPiece:
    """Evaluate what was made of a piece, so that nothing else of it needs to stay."""
    mx.eval(weights)
    mx.clear_cache()
    held_bytes: int = tree_reduce(lambda total, leaf: total + _num_bytes(leaf), weights, 0)
    return LoadedPiece(piece.tensor_names, held_bytes)


def _num_bytes(leaf: mx.array | int | None) -> int:
    """An array's; a quantized matrix also has numbers for leaves."""
    return leaf.nbytes if isinstance(leaf, mx.array) else 0


def _check_kernels(config: ModelConfig, layers: list[LayerWeights], dtype: mx.Dtype) -> tuple[str, ...]:
    """Have the kernels for these layers checked now: the first step would do it in the midst of compiling."""
    for layer in layers:
        if isinstance(layer.feed_forward, MoeWeights):
            return prepare(layer.feed_forward.experts, config.num_experts_per_tok, dtype)
    return ()


class StageLoader:
    """Loads the layers that Load messages ask for, from one model on this host.

    ``on_layer`` is called with each part that is in memory, ``on_download`` with (bytes done, bytes in total) while
    files are fetched from the Hub.
    """

    def __init__(
        self,
        description: ModelDescription,
        source: ModelSource,
        on_layer: Callable[[LoadedPiece], None],
        on_download: Callable[[int, int], None],
    ) -> None:
        self._description = description
        self._source = source
        self._on_layer = on_layer
        self._on_download = on_download
        self._held_bytes = 0

    def load(self, message: Load, transport: Transport) -> tuple[StepRunner, Loaded]:
        """Load the layers and their cache; return what runs steps on them, and the answer to the message.

        Raises:
            CheckpointError, DownloadError: a file is missing, cannot be fetched, or does not hold what it should.
            StageStartError: macOS does not let a GPU hold as much memory as the stage needs.
        """
        wire_memory(message.needed_bytes)
        config = self._description.config
        layers = range(message.first_layer, message.end_layer)
        specs = shard_specs(config, layers.start, layers.stop)
        files = locate_shard(self._source, self._description.index, specs, self._on_download)
        dtype = getattr(mx, message.dtype)
        cache = LatentCache(len(layers), message.num_slots, message.context_tokens, config.latent_dim, dtype)
        reader = ShardReader(config, files, dtype)
        model, warnings = load_stage_model(config, reader, layers, cache, self._on_piece, message.dense_bits)
        runner = StepRunner(
            model,
            transport,
            PlanLimits(message.num_slots, message.context_tokens, config.vocab_size),
            is_first=layers.start == 0,
            is_last=layers.stop == config.num_hidden_layers,
            hidden_size=config.hidden_size,
            dtype=dtype,
        )
        cache_bytes_per_token = len(layers) * config.latent_dim * dtype.size
        return runner, Loaded(self._held_bytes, peak_bytes(), cache_bytes_per_token, warnings)

    def _on_piece(self, piece: LoadedPiece) -> None:
        self._held_bytes += piece.held_bytes
        self._on_layer(piece)
