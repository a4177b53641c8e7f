"""Builds a stage's model from the checkpoint, piece by piece. Knows no messages."""

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
from mlx_k2.stage.host import on_gpu
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
