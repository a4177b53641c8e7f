"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), in absorbed and in naive form.

Absorbed: queries are projected into the latent space and attend to the cached rows directly, one key head for all
query heads. Few queries need few operations, so generated tokens use it. Naive: keys and values are rebuilt from the
latents for each head, with 3.4 times fewer operations per query and key. Prompts use it. Both agree up to rounding.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlx_k2.config import ModelConfig
from mlx_k2.model.layer_weights import AttentionWeights, LowRankQuery
from mlx_k2.model.linear import Matrix, multiply, multiply_transposed, some_heads
from mlx_k2.model.rope import Rotate

BOTTLENECK_NORM_EPS = 1e-6
"""Epsilon of the target's q_a_layernorm and kv_a_layernorm: the published code's default, not the config's."""

FUSED_FROM_BYTES = 128 * 2**20
"""Scores from which the first chunk of a prompt uses the fused kernel."""
_FEWEST_QUERIES = 256
"""Fewest queries in a block for which products of scores keep a GPU busy."""


class AttentionLimits(NamedTuple):
    """Limits of the blocks of heads and queries in which attention is computed.

    ``block_bytes`` limits a block's scores and the keys and values rebuilt for it. Two blocks are in memory at a time.
    A block has at least ``min_heads`` heads, whose keys and values may exceed the limit on a CPU. With ``fused``,
    MLX's fused kernel may be used, which exists on GPUs only and stores no scores.
    """

    block_bytes: int = 128 * 2**20
    min_heads: int = 1
    fused: bool = False


ON_CPU = AttentionLimits()


class Projections(NamedTuple):
    """Projections of a batch's hidden states, computed before attention reads the cache. The queries are scaled."""

    absorbed_queries: mx.array | None  # (heads, generated tokens, kv_lora_rank + qk_rope)
    naive_queries: mx.array | None  # (heads, prompt tokens, qk_nope + qk_rope)
    cache_rows: mx.array  # (tokens, kv_lora_rank + qk_rope): rows to write to the cache


Project = Callable[[mx.array, mx.array, int, AttentionWeights], Projections]


def make_projections(config: ModelConfig, rotate: Rotate, bottleneck_eps: float = BOTTLENECK_NORM_EPS) -> Project:
    """Return the function (hidden (tokens, inputs), positions (tokens,), num_generated, weights) -> Projections."""
    heads, nope, kv_lora_rank = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
    query_dim, scale = config.qk_head_dim, config.softmax_scale

    def project(hidden: mx.array, positions: mx.array, num_generated: int, weights: AttentionWeights) -> Projections:
        queries = _query(hidden, weights, bottleneck_eps).reshape(-1, heads, query_dim) * scale
        without_position = queries[..., :nope].swapaxes(0, 1)  # (heads, tokens, qk_nope)
        rotated = rotate(queries[..., nope:], positions).swapaxes(0, 1)
        compressed = multiply(hidden, weights.latent_down)
        latent = mx.fast.rms_norm(compressed[:, :kv_lora_rank], weights.latent_norm, bottleneck_eps)
        rotated_key = rotate(compressed[:, None, kv_lora_rank:], positions).squeeze(1)
        absorbed = naive = None
        if num_generated > 0:
            in_latent_space = multiply(without_position[:, :num_generated], weights.key_up)
            absorbed = mx.concatenate([in_latent_space, rotated[:, :num_generated]], axis=-1)
        if num_generated < hidden.shape[0]:
            naive = mx.concatenate([without_position[:, num_generated:], rotated[:, num_generated:]], axis=-1)
        return Projections(absorbed, naive, mx.concatenate([latent, rotated_key], axis=-1))

    return project


def _query(hidden: mx.array, weights: AttentionWeights, eps: float) -> mx.array:
    query = weights.query
    if isinstance(query, LowRankQuery):
        bottleneck = mx.fast.rms_norm(multiply(hidden, query.down), query.norm, eps)
        return multiply(bottleneck, query.up)
    return multiply(hidden, query)


def attend_absorbed(
    queries: mx.array, keys: mx.array, position: int, kv_lora_rank: int, limits: AttentionLimits = ON_CPU
) -> mx.array:
    """Return the attention of ``queries`` (heads, count, row), the first at ``position``, to ``keys`` (keys, row).

    The result (heads, count, kv_lora_rank) is in the latent space; ``value_up`` projects it to each head's values.
    """
    heads, count, _ = queries.shape

    def attend(block: slice) -> mx.array:
        scores = _hide_later_keys(queries[:, block] @ keys.T, position + block.start)
        return mx.softmax(scores, axis=-1, precise=True) @ keys[:, :kv_lora_rank]

    query_block = limits.block_bytes // (heads * _scores_bytes(keys.shape[0], queries.itemsize))
    return _in_blocks(attend, count, query_block, axis=1)


def fits_absorbed(heads: int, count: int, num_keys: int, item_bytes: int, limits: AttentionLimits = ON_CPU) -> bool:
    """Return whether `attend_absorbed` processes these queries in one block and therefore evaluates nothing."""
    return heads * count * _scores_bytes(num_keys, item_bytes) <= limits.block_bytes


class NaiveBlocks(NamedTuple):
    """The blocks in which naive attention is computed: heads, and queries of each of them. ``fused``: the kernel."""

    heads: int
    queries: int
    fused: bool


def naive_blocks(
    heads: int, count: int, head_dim: int, position: int, item_bytes: int, limits: AttentionLimits
) -> NaiveBlocks:
    """Return the blocks for ``count`` queries of a prompt, the first at ``position``.

    The fused kernel is slower for a head of 192 values (MLX: sdpa_vector.cpp), except for the first chunk, of whose
    pairs it skips the masked half. It is also used if too few queries fit.
    """
    num_keys = position + count
    query_scores_bytes = _scores_bytes(num_keys, item_bytes)
    rebuilt_bytes = rebuilt_bytes_per_head(num_keys, head_dim, item_bytes)
    head_block = max(limits.block_bytes // (rebuilt_bytes + count * query_scores_bytes), min(limits.min_heads, heads))
    left_bytes = max(limits.block_bytes - max(1, head_block) * rebuilt_bytes, limits.block_bytes // 4)
    query_block = left_bytes // (max(1, head_block) * query_scores_bytes)
    is_first = position == 0 and heads * count * query_scores_bytes > FUSED_FROM_BYTES
    if limits.fused and (is_first or query_block < min(count, _FEWEST_QUERIES)):
        return NaiveBlocks(max(limits.block_bytes // rebuilt_bytes, head_block), count, fused=True)
    return NaiveBlocks(head_block, query_block, fused=False)


def rebuilt_bytes_per_head(num_keys: int, head_dim: int, item_bytes: int) -> int:
    """Return the bytes of one head's rebuilt keys, their two parts, and values."""
    return num_keys * 3 * head_dim * item_bytes


def attend_naive(
    queries: mx.array, keys: mx.array, position: int, weights: AttentionWeights, limits: AttentionLimits = ON_CPU
) -> mx.array:
    """Return the attention (heads, count, v_head) of ``queries`` (heads, count, qk_head) to ``keys`` (keys, row).

    The first query is at ``position``. Heads, and then queries, are processed in blocks (`naive_blocks`).
    """
    heads, count, head_dim = queries.shape
    blocks = naive_blocks(heads, count, head_dim, position, queries.itemsize, limits)

    def attend(block: slice) -> mx.array:
        head_keys, head_values = _rebuild(
            keys, some_heads(weights.key_up, block), some_heads(weights.value_up, block), weights.latent_norm.size
        )
        if blocks.fused:
            return attend_fused(queries[block], head_keys, head_values, force=True)
        return attend_unfused(queries[block], head_keys, head_values, position, blocks.queries)

    return _in_blocks(attend, heads, blocks.heads, axis=0)


def _rebuild(cache_rows: mx.array, key_up: Matrix, value_up: Matrix, kv_lora_rank: int) -> tuple[mx.array, mx.array]:
    """Return keys (heads, keys, qk_head) and values (heads, keys, v_head) of cached rows (keys, row)."""
    latents, rotated = cache_rows[:, :kv_lora_rank], cache_rows[:, kv_lora_rank:]
    without_position = multiply_transposed(latents, key_up)
    shared = mx.broadcast_to(rotated, (without_position.shape[0], *rotated.shape))
    return mx.concatenate([without_position, shared], axis=-1), multiply(latents, value_up)


def attend_unfused(queries: mx.array, keys: mx.array, values: mx.array, position: int, query_block: int) -> mx.array:
    """Return the attention of queries (heads, count, qk_head) to keys and values (heads, keys, ...).

    The result is (heads, count, v_head). ``query_block`` queries are processed at a time, with the keys up to the last
    of them.
    """

    def attend(block: slice) -> mx.array:
        end = position + block.stop
        scores = _hide_later_keys(queries[:, block] @ keys[:, :end].swapaxes(-1, -2), position + block.start)
        return mx.softmax(scores, axis=-1, precise=True) @ values[:, :end]

    return _in_blocks(attend, queries.shape[1], query_block, axis=1)


def attend_fused(queries: mx.array, keys: mx.array, values: mx.array, *, force: bool) -> mx.array:
    """Compute attention by MLX's fused kernel, which requires values as wide as keys and masks later keys itself.

    The queries belong to the last positions of the keys. Without ``force`` MLX chooses whether to use the kernel,
    which exists on GPUs only.
    """
    value_dim = values.shape[-1]
    padded = mx.pad(values, [(0, 0), (0, 0), (0, keys.shape[-1] - value_dim)])
    attended = mx.fast.scaled_dot_product_attention(
        queries[None], keys[None], padded[None], scale=1.0, mask="causal", force_fused=force
    )
    return attended[0, ..., :value_dim]


def _hide_later_keys(scores: mx.array, position: int) -> mx.array:
    """Mask scores (heads, count, keys): the query at ``position`` + i attends to keys 0 to ``position`` + i only."""
    _, count, num_keys = scores.shape
    if position + 1 == num_keys:
        return scores
    queries = mx.arange(position, position + count)[:, None]
    return mx.where(mx.arange(num_keys) <= queries, scores, -mx.inf)


def _scores_bytes(num_keys: int, item_bytes: int) -> int:
    """Return the bytes of one query's scores in one head while computed: an operation's input and its output."""
    return 2 * num_keys * item_bytes


def _in_blocks(compute: Callable[[slice], mx.array], total: int, block: int, axis: int) -> mx.array:
    """Return ``compute`` of ``total`` items, at most ``block`` (at least 1) at a time, joined along ``axis``.

    If there are several blocks, each is evaluated while the next one is built. Otherwise MLX would allocate memory for
    many blocks at once.
    """
    if total <= block:
        return compute(slice(0, total))
    parts: list[mx.array] = []
    for start in range(0, total, max(1, block)):
        parts.append(compute(slice(start, min(start + max(1, block), total))))
        mx.async_eval(parts[-1])
        mx.eval(parts[-2:-1])
    return mx.concatenate(parts, axis)
