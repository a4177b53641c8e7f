"""Builds a stage's model from the checkpoint, piece by piece. Knows no messages."""

from collections.abc import Callable

import mlx.core as mx

from mlx_k2.config import ModelConfig
from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.model.layer_weights import assemble_layer
from mlx_k2.model.stage_model import Head, StageModel
from mlx_k2.weights.reader import Piece, ShardReader


def load_stage_model(
    config: ModelConfig,
    reader: ShardReader,
    layers: range,
    cache: LatentCache,
    on_piece: Callable[[Piece], None],
) -> StageModel:
    """The model of ``layers``, with the embedding if they are the first ones and the head if they are the last.

    ``on_piece`` is told of each piece as soon as it is in memory.
    """

    def tell(piece: Piece) -> Piece:
        on_piece(piece)
        return piece

    embedding = head = None
    if layers.start == 0:
        embedding = tell(reader.embedding()).tensors["model.embed_tokens.weight"]
    weights = []
    for layer in layers:
        weights.append(assemble_layer(config, layer, tell(reader.layer(layer)).tensors))
        mx.eval(weights[-1])
        mx.clear_cache()
    if layers.stop == config.num_hidden_layers:
        tensors = tell(reader.head()).tensors
        head = Head(tensors["model.norm.weight"], tensors["lm_head.weight"].T)
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    return StageModel(config, weights, embedding, head, cache, fused_attention=on_gpu)
