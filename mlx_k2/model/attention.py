"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), computed in both of its ways.

Absorbed: queries are carried into the latent space and attend to the cached rows themselves, one key head for all
query heads. Few operations for few queries: generated tokens. Naive: keys and values are rebuilt from the latents for
each head, 3.4 times fewer operations for each query and key: prompts. The two agree up to rounding.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlx_k2.config import ModelConfig
from mlx_k2.model.layer_weights import AttentionWeights, LowRankQuery
from mlx_k2.model.rope import Rotate

BOTTLENECK_NORM_EPS = 1e-6
"""Of q_a_layernorm and kv_a_layernorm: the published code's default, not the config's rms_norm_eps."""

SCORE_BYTES = 256 * 2**20
"""Scores, with the keys and values rebuilt for them, are held for as many heads or queries at once as fit here."""


class Projections(NamedTuple):
    """What attention makes of a batch's hidden states before it looks at the cache."""

    absorbed_queries: mx.array  # (generated tokens, heads, kv_lora_rank + qk_rope), scaled
    naive_queries: mx.array  # (prompt tokens, heads, qk_nope + qk_rope), scaled
    rows: mx.array  # (tokens, kv_lora_rank + qk_rope): what goes into the cache


Project = Callable[[mx.array, mx.array, int, AttentionWeights], Projections]


def make_projections(config: ModelConfig, rotate: Rotate) -> Project:
    """The function (hidden (tokens, hidden), positions (tokens,), num_generated, weights) -> Projections."""
    heads, nope, latent_dim = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
    scale = config.softmax_scale

    def project(hidden: mx.array, positions: mx.array, num_generated: int, weights: AttentionWeights) -> Projections:
        queries = _query(hidden, weights).reshape(-1, heads, config.qk_head_dim) * scale
        without_position, rotated = queries[..., :nope], rotate(queries[..., nope:], positions)
        compressed = hidden @ weights.latent_down.T
        latent = mx.fast.rms_norm(compressed[:, :latent_dim], weights.latent_norm, BOTTLENECK_NORM_EPS)
        rotated_key = rotate(compressed[:, None, latent_dim:], positions).squeeze(1)
        absorbed = without_position[:num_generated].swapaxes(0, 1) @ weights.key_up  # (heads, generated, latent)
        return Projections(
            mx.concatenate([absorbed.swapaxes(0, 1), rotated[:num_generated]], axis=-1),
            mx.concatenate([without_position[num_generated:], rotated[num_generated:]], axis=-1),
            mx.concatenate([latent, rotated_key], axis=-1),
        )

    return project


def _query(hidden: mx.array, weights: AttentionWeights) -> mx.array:
    query = weights.query
    if isinstance(query, LowRankQuery):
        return mx.fast.rms_norm(hidden @ query.down.T, query.norm, BOTTLENECK_NORM_EPS) @ query.up.T
    return hidden @ query.projection.T


def attend_absorbed(queries: mx.array, keys: mx.array, mask: mx.array | None, latent_dim: int) -> mx.array:
    """Queries (count, heads, row) over cached ``keys`` (keys, row) -> latents (count, heads, latent_dim)."""
    count, heads, row_dim = queries.shape
    at_once = max(1, SCORE_BYTES // (heads * keys.shape[0] * 4))
    blocks = []
    for start in range(0, count, at_once):
        end = min(start + at_once, count)
        scores = queries[start:end].reshape(-1, row_dim) @ keys.T
        if mask is not None:
            scores = _masked(scores.reshape(end - start, heads, -1), mask[start:end, None]).reshape(scores.shape)
        weights = mx.softmax(scores, axis=-1, precise=True)
        blocks.append((weights @ keys[:, :latent_dim]).reshape(end - start, heads, latent_dim))
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks)


def attend_naive(
    queries: mx.array, keys: mx.array, mask: mx.array | None, weights: AttentionWeights, *, fused: bool
) -> mx.array:
    """Queries (count, heads, qk_head) over cached ``keys`` (keys, row) -> values (count, heads, v_head).

    Heads, then queries, are taken in blocks, so that no more than SCORE_BYTES is held at a time. ``fused`` lets a GPU
    kernel that keeps no scores take over where scores would be larger than that; it needs unpadded keys.
    """
    count, heads, head_dim = queries.shape
    num_keys, item_bytes = keys.shape[0], queries.itemsize
    rebuilt_bytes = num_keys * (2 * head_dim) * item_bytes  # one head's keys and values, these padded when fused
    scores_bytes = count * num_keys * 4
    fused = fused and heads * scores_bytes > SCORE_BYTES
    head_block = max(1, SCORE_BYTES // (rebuilt_bytes + (0 if fused else scores_bytes)))
    query_block = count if fused else max(1, SCORE_BYTES // (num_keys * 4))
    outputs = []
    for start in range(0, heads, head_block):
        block = slice(start, min(start + head_block, heads))
        head_keys, head_values = _rebuild(keys, weights.key_up[block], weights.value_up[block])
        block_queries = queries[:, block].swapaxes(0, 1)
        if fused:
            attended = _attend_fused(block_queries, head_keys, head_values)
        else:
            attended = _attend_unfused(block_queries, head_keys, head_values, mask, query_block)
        outputs.append(attended)
    joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    return joined.swapaxes(0, 1)


def _rebuild(rows: mx.array, key_up: mx.array, value_up: mx.array) -> tuple[mx.array, mx.array]:
    """Cached rows (keys, row) -> keys (heads, keys, qk_head) and values (heads, keys, v_head)."""
    latent_dim = key_up.shape[-1]
    latents, rotated = rows[:, :latent_dim], rows[:, latent_dim:]
    without_position = latents @ key_up.swapaxes(-1, -2)
    shared = mx.broadcast_to(rotated, (key_up.shape[0], *rotated.shape))
    return mx.concatenate([without_position, shared], axis=-1), latents @ value_up.swapaxes(-1, -2)


def _attend_unfused(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None, query_block: int
) -> mx.array:
    """(heads, count, qk_head) -> (heads, count, v_head), ``query_block`` queries at a time."""
    blocks = []
    for start in range(0, queries.shape[1], query_block):
        block = slice(start, start + query_block)
        scores = queries[:, block] @ keys.swapaxes(-1, -2)
        if mask is not None:
            scores = _masked(scores, mask[block])
        blocks.append(mx.softmax(scores, axis=-1, precise=True) @ values)
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=1)


def _attend_fused(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """The same through MLX's fused kernel, which wants values as wide as keys and masks the future itself."""
    value_dim = values.shape[-1]
    padded = mx.pad(values, [(0, 0), (0, 0), (0, keys.shape[-1] - value_dim)])
    attended = mx.fast.scaled_dot_product_attention(
        queries[None], keys[None], padded[None], scale=1.0, mask="causal", force_fused=True
    )
    return attended[0, ..., :value_dim]


def _masked(scores: mx.array, mask: mx.array) -> mx.array:
    return scores + mask.astype(scores.dtype)
