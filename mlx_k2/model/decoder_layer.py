"""One decoder layer over a batch. Its two halves around attention are compiled once and shared by all layers.

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
from mlx_k2.model.rope import make_rope

RunLayer = Callable[[mx.array, int, LayerWeights, Batch, LatentCache], mx.array]


def make_layer(config: ModelConfig, *, fused_attention: bool) -> RunLayer:
    """The function (hidden (tokens, hidden), layer's index in the cache, weights, batch, cache) -> (tokens, hidden)."""
    project = make_projections(config, make_rope(config))
    feed_forward = make_feed_forward(config)
    eps = config.rms_norm_eps

    @mx.compile
    def before(
        hidden: mx.array, positions: mx.array, num_generated: int, norm: mx.array, weights: AttentionWeights
    ) -> Projections:
        return project(mx.fast.rms_norm(hidden, norm, eps), positions, num_generated, weights)

    @mx.compile
    def after(hidden: mx.array, latents: mx.array | None, values: mx.array | None, weights: LayerWeights) -> mx.array:
        attended = _join_heads(latents, values, weights.attention)
        hidden = hidden + attended @ weights.attention.output.T
        return hidden + feed_forward(mx.fast.rms_norm(hidden, weights.post_attention_norm, eps), weights.feed_forward)

    def run(hidden: mx.array, index: int, weights: LayerWeights, batch: Batch, cache: LatentCache) -> mx.array:
        projections = before(hidden, batch.positions, batch.num_generated, weights.input_norm, weights.attention)
        latents, values = _attend(projections, index, weights.attention, batch, cache)
        return after(hidden, latents, values, weights)

    def _attend(
        projections: Projections, index: int, weights: AttentionWeights, batch: Batch, cache: LatentCache
    ) -> tuple[mx.array | None, mx.array | None]:
        absorbed, naive = [], []
        start = 0
        for number, span in enumerate(batch.spans):
            end = start + span.count
            keys = cache.write(index, batch, number, projections.rows[start:end])
            mask = batch.masks[number]
            if span.is_prompt:
                queries = projections.naive_queries[start - batch.num_generated : end - batch.num_generated]
                naive.append(attend_naive(queries, keys, mask, weights, fused=fused_attention))
            else:
                queries = projections.absorbed_queries[start:end]
                absorbed.append(attend_absorbed(queries, keys, mask, config.kv_lora_rank))
            start = end
        return _concatenate(absorbed), _concatenate(naive)

    return run


def _concatenate(parts: list[mx.array]) -> mx.array | None:
    if len(parts) > 1:
        return mx.concatenate(parts)
    return parts[0] if parts else None


def _join_heads(latents: mx.array | None, values: mx.array | None, weights: AttentionWeights) -> mx.array:
    """Latents of generated tokens, then values of prompt tokens, as values: (tokens, heads * v_head)."""
    parts = []
    if latents is not None:
        parts.append((latents.swapaxes(0, 1) @ weights.value_up.swapaxes(-1, -2)).swapaxes(0, 1))
    if values is not None:
        parts.append(values)
    joined = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    return joined.reshape(joined.shape[0], -1)
