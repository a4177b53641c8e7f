"""One decoder layer over a batch. Its two halves around attention are shared by all layers, and compiled if small.

Between them lies what depends on how long each sequence is: writing the cache and attending to it.
"""

from collections.abc import Callable

import mlx.core as mx

from mlx_k2.config import ModelConfig
from mlx_k2.model.attention import Projections, attend_absorbed, attend_naive, make_projections
from mlx_k2.model.batch import Batch
from mlx_k2.model.feed_forward import make_feed_forward
from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.model.layer_weights import AttentionWeights, LayerWeights
from mlx_k2.model.linear import multiply
from mlx_k2.model.rope import make_rope

RunLayer = Callable[[mx.array, int, LayerWeights, Batch, LatentCache], mx.array]

COMPILED_TOKENS = 16
"""Batches of at most this many tokens run compiled: each size is compiled once and kept, and only for small ones does
building the graph take longer than running it."""


def make_layer(config: ModelConfig, *, fused_attention: bool) -> RunLayer:
    """The function (hidden (tokens, hidden), layer's index in the cache, weights, batch, cache) -> (tokens, hidden)."""
    project = make_projections(config, make_rope(config))
    feed_forward = make_feed_forward(config)
    eps = config.rms_norm_eps

    def before(
        hidden: mx.array, positions: mx.array, num_generated: int, norm: mx.array, weights: AttentionWeights
    ) -> Projections:
        return project(mx.fast.rms_norm(hidden, norm, eps), positions, num_generated, weights)

    def after(hidden: mx.array, latents: mx.array | None, values: mx.array | None, weights: LayerWeights) -> mx.array:
        attended = _join_heads(latents, values, weights.attention)
        hidden = hidden + multiply(attended, weights.attention.output)
        return hidden + feed_forward(mx.fast.rms_norm(hidden, weights.post_attention_norm, eps), weights.feed_forward)

    compiled_before, compiled_after = mx.compile(before), mx.compile(after)

    def run(hidden: mx.array, index: int, weights: LayerWeights, batch: Batch, cache: LatentCache) -> mx.array:
        is_small = batch.num_tokens <= COMPILED_TOKENS
        first, second = (compiled_before, compiled_after) if is_small else (before, after)
        projections = first(hidden, batch.positions, batch.num_generated, weights.input_norm, weights.attention)
        latents, values = _attend(projections, index, weights.attention, batch, cache)
        return second(hidden, latents, values, weights)

    def _attend(
        projections: Projections, index: int, weights: AttentionWeights, batch: Batch, cache: LatentCache
    ) -> tuple[mx.array | None, mx.array | None]:
        absorbed, naive = [], []
        start = 0
        for span in batch.spans:
            end = start + span.count
            keys = cache.write(index, span, projections.cache_rows[start:end])
            if span.is_prompt:
                assert projections.naive_queries is not None
                queries = projections.naive_queries[:, start - batch.num_generated : end - batch.num_generated]
                naive.append(attend_naive(queries, keys, span.position, weights, fused=fused_attention))
            else:
                assert projections.absorbed_queries is not None
                queries = projections.absorbed_queries[:, start:end]
                absorbed.append(attend_absorbed(queries, keys, span.position, config.kv_lora_rank))
            start = end
        return _join_spans(absorbed), _join_spans(naive)

    return run


def _join_spans(parts: list[mx.array]) -> mx.array | None:
    """Each (heads, count, width) -> (heads, tokens, width)."""
    if len(parts) > 1:
        return mx.concatenate(parts, axis=1)
    return parts[0] if parts else None


def _join_heads(latents: mx.array | None, values: mx.array | None, weights: AttentionWeights) -> mx.array:
    """Latents of generated tokens, then values of prompt tokens, as values: (tokens, heads * v_head)."""
    parts = [] if latents is None else [multiply(latents, weights.value_up)]
    if values is not None:
        parts.append(values)
    joined = _join_spans(parts)
    assert joined is not None, "a step without tokens"
    return joined.swapaxes(0, 1).flatten(1)
