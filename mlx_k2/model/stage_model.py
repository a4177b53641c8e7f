"""One stage's part of the model: a range of layers with their cache, and the embedding or the head, if it has them.

The model builds the graph of a step, and the caller evaluates it. Only attention in several blocks is evaluated while
the graph is built (`StageModel.builds_lazily`).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import mlx.core as mx

from mlx_k2.config import ModelConfig
from mlx_k2.model.attention import ON_CPU, AttentionLimits, fits_absorbed
from mlx_k2.model.batch import Batch
from mlx_k2.model.decoder_layer import DecoderLayer
from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.model.layer_weights import LayerWeights
from mlx_k2.model.linear import Matrix, multiply
from mlx_k2.weights.reader import is_finite


class Head(NamedTuple):
    """Weights that convert the last layer's output to logits."""

    norm: mx.array  # (hidden,)
    projection: Matrix  # (hidden, vocabulary)


class FeatureSlice(NamedTuple):
    """The part of a draft head's ``fc`` that multiplies one layer's output, and the norm before it."""

    norm: mx.array | None  # (hidden,), of EAGLE 3.1; None: the output is not normed
    matrix: Matrix  # (hidden, hidden)
    eps: float

    def product(self, output: mx.array) -> mx.array:
        """Return the slice's product (tokens, hidden) with the layer's output (tokens, hidden)."""
        normed = output if self.norm is None else mx.fast.rms_norm(output, self.norm, self.eps)
        return multiply(normed, self.matrix)


class StageModel:
    """The model of one stage. Only the first stage embeds tokens, only the last has a ``head``.

    ``feature_slices`` has a draft head's slices for those of ``layers`` whose output the head reads, by their index.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: list[LayerWeights],
        embedding: mx.array | None,
        head: Head | None,
        cache: LatentCache,
        attention_limits: AttentionLimits = ON_CPU,
        feature_slices: Mapping[int, FeatureSlice] = MappingProxyType({}),
    ) -> None:
        self.config = config
        self._layers = layers
        self.embedding = embedding
        self.head = head
        self.cache = cache
        self._attention_limits = attention_limits
        self.feature_slices = feature_slices
        self._decoder_layer = DecoderLayer(config, attention_limits)

    def embed(self, token_ids: mx.array) -> mx.array:
        """Return the hidden states (tokens, hidden) of token ids (tokens,)."""
        assert self.embedding is not None, "only the first stage embeds"
        return self.embedding[token_ids]

    def builds_lazily(self, batch: Batch) -> bool:
        """Return whether `run` evaluates nothing. Then it can be called before the hidden states have arrived."""
        heads, item_bytes = self.config.num_attention_heads, self.cache.dtype.size
        return batch.num_generated == batch.num_tokens and all(
            fits_absorbed(heads, span.count, span.end, item_bytes, self._attention_limits) for span in batch.spans
        )

    def run(self, hidden: mx.array, batch: Batch, features: mx.array | None = None) -> tuple[mx.array, mx.array | None]:
        """Run hidden states (tokens, hidden) through this stage's layers, which also write the cache.

        Return the hidden states, and ``features`` (tokens, hidden) plus the products of a draft head's ``fc`` with
        these layers' outputs. Each layer's product is added separately, in the order of the layers, so that every
        partition into stages computes the same bits.
        """
        for index, weights in enumerate(self._layers):
            hidden = self._decoder_layer.run(hidden, index, weights, batch, self.cache)
            if features is not None and index in self.feature_slices:
                features = features + self.feature_slices[index].product(hidden)
        return hidden, features

    def first_broken_layer(self, hidden: mx.array, batch: Batch) -> int | None:
        """Return the index of the first layer whose output has NaN or infinity; None if there is none.

        Runs the layers again. With the arguments of the last `run` they write the same cache rows.
        """
        for index, weights in enumerate(self._layers):
            hidden = self._decoder_layer.run(hidden, index, weights, batch, self.cache)
            if not is_finite(mx.sum(hidden)):
                return index
        return None

    def cache_total(self, batch: Batch) -> mx.array:
        """Return the sum of the rows that the last layer of this stage has cached for a batch.

        The sum is NaN or infinite if an earlier layer or the projection to these rows computed NaN or infinity.
        """
        return mx.sum(mx.stack([mx.sum(self.cache.rows(-1, span)) for span in batch.spans]))

    def logits(self, hidden: mx.array) -> mx.array:
        """Return logits (rows, vocabulary) float32 of hidden states (rows, hidden) after the last layer."""
        assert self.head is not None, "only the last stage has the head"
        normed = mx.fast.rms_norm(hidden, self.head.norm, self.config.rms_norm_eps)
        return multiply(normed, self.head.projection).astype(mx.float32)
