"""A draft head (EAGLE-3) over its cache: one decoder layer that reads a token and the features of the position before.

The features of a position are the product of ``fc`` with the outputs of some of the target's layers there. Row p of the
head's cache is computed from the token at position p and the features of position p - 1. As in training, the head
rotates this row by p - 1, not p. Row 0, without features before it, is never read.

A cache row needs no attention. So for a token after which nothing is drafted only the row is written.
"""

from typing import NamedTuple

import mlx.core as mx

from mlx_k2.config import ModelConfig
from mlx_k2.model.attention import ON_CPU, AttentionLimits, Projections, attend_absorbed, make_projections
from mlx_k2.model.batch import Batch, Span
from mlx_k2.model.decoder_layer import join_heads, swiglu
from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.model.layer_weights import AttentionWeights, DenseWeights
from mlx_k2.model.linear import Matrix, multiply
from mlx_k2.model.rope import make_rope


class DraftWeights(NamedTuple):
    """Weights of a draft head. ``embedding`` and ``projection`` may be the target's."""

    embedding: mx.array  # (vocabulary, hidden)
    input_norm: mx.array  # (hidden,), of the embedding
    hidden_norm: mx.array  # (hidden,), of the features
    attention: AttentionWeights  # with 2 * hidden inputs
    post_attention_norm: mx.array  # (hidden,)
    feed_forward: DenseWeights
    norm: mx.array  # (hidden,)
    projection: Matrix  # (hidden, drafted ids)
    target_ids: mx.array | None  # (drafted ids,) int32: the target's token ids; None: all of them, in order


class DraftOutput(NamedTuple):
    """The head's output for one token."""

    normed: mx.array  # (1, hidden), for the logits
    features: mx.array  # (1, hidden), in place of the target's features of this position for the next draft token


class DraftModel:
    """A draft head and its cache of all slots. ``config`` describes its decoder layer.

    With ``norms_output`` the features that the head computes are normed.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DraftWeights,
        cache: LatentCache,
        *,
        norms_output: bool,
        attention_limits: AttentionLimits = ON_CPU,
    ) -> None:
        self._vocab_size = config.vocab_size
        self._eps = config.rms_norm_eps
        self._kv_lora_rank = config.kv_lora_rank
        self._weights = weights
        self._norms_output = norms_output
        self._attention_limits = attention_limits
        self._project = make_projections(config, make_rope(config), config.rms_norm_eps)
        self._compiled_before, self._compiled_after = mx.compile(self._before), mx.compile(self._after)
        self.cache = cache

    def write_rows(self, token_ids: mx.array, features: mx.array, batch: Batch) -> None:
        """Write the cache rows of a batch's tokens (tokens,). ``features`` (tokens, hidden) are those before each."""
        projections = self._before(token_ids, features, batch.positions, self._weights)  # lazy: no query is evaluated
        start = 0
        for span in batch.spans:
            self.cache.write(0, span, projections.cache_rows[start : start + span.count])
            start += span.count

    def run(self, token_id: int, features: mx.array, slot: int, position: int) -> DraftOutput:
        """Run the head for a token at ``position`` (at least 1). ``features`` (1, hidden) are those before it."""
        positions = mx.array([position], mx.int32)
        projections = self._compiled_before(mx.array([token_id]), features, positions, self._weights)
        assert projections.absorbed_queries is not None, "the token counts as generated"
        keys = self.cache.write(0, Span(slot, position, 1, is_prompt=False), projections.cache_rows)[1:]
        latents = attend_absorbed(
            projections.absorbed_queries, keys, position - 1, self._kv_lora_rank, self._attention_limits
        )
        return DraftOutput(*self._compiled_after(features, latents, self._weights))

    def logits(self, output: DraftOutput) -> mx.array:
        """Return logits (1, vocabulary) float32 of the next token; -inf for tokens that the head never drafts."""
        drafted_logits = multiply(output.normed, self._weights.projection).astype(mx.float32)
        target_ids = self._weights.target_ids
        if target_ids is None:
            return drafted_logits
        logits = mx.full((1, self._vocab_size), -mx.inf)
        logits[:, target_ids] = drafted_logits
        return logits

    def _before(
        self, token_ids: mx.array, features: mx.array, positions: mx.array, weights: DraftWeights
    ) -> Projections:
        embedded = mx.fast.rms_norm(weights.embedding[token_ids], weights.input_norm, self._eps)
        normed = mx.fast.rms_norm(features, weights.hidden_norm, self._eps)
        joined = mx.concatenate([embedded, normed], axis=-1)
        return self._project(joined, mx.maximum(positions - 1, 0), len(token_ids), weights.attention)

    def _after(self, features: mx.array, latents: mx.array, weights: DraftWeights) -> tuple[mx.array, mx.array]:
        hidden = features + multiply(join_heads(latents, None, weights.attention), weights.attention.output)
        normed = mx.fast.rms_norm(hidden, weights.post_attention_norm, self._eps)
        hidden = hidden + swiglu(normed, weights.feed_forward)
        normed = mx.fast.rms_norm(hidden, weights.norm, self._eps)
        return normed, normed if self._norms_output else hidden
