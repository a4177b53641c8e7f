"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), in absorbed and in naive form.

Absorbed: queries are projected into the latent space and attend to the cached rows, which are the keys of all heads.
Generated tokens use this form, because it rebuilds no keys and values. Naive: keys and values are rebuilt from the
latents for each head; then each pair of query and key needs 3.4 times fewer operations. Prompts use this form. Both
agree up to rounding.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlx_k2.cluster.memory import CPU_BLOCK_BYTES
from mlx_k2.config import ModelConfig
from mlx_k2.model.layer_weights import AttentionWeights, LowRankQuery
from mlx_k2.model.linear import Matrix, multiply, multiply_transposed, some_heads
from mlx_k2.model.rope import Rotate

BOTTLENECK_NORM_EPS = 1e-6
"""Epsilon of the target's q_a_layernorm and kv_a_layernorm: the published code's default, not the config's."""

FUSED_FROM_BYTES = 128 * 2**20
"""Bytes of scores above which the first chunk of a prompt uses the fused kernel."""
_MIN_BLOCK_QUERIES = 256
"""Smallest number of queries in a block with which the products for the scores keep a GPU busy."""


class AttentionLimits(NamedTuple):
    """Limits of the blocks of heads and queries in which attention is computed.

    ``block_bytes`` limits the bytes of a block's scores and rebuilt keys and values. Two blocks are in memory at a
    time. A block has at least ``min_heads`` heads, even if their keys and values alone exceed the limit. With
    ``fused``, MLX's fused kernel may be used, which exists on GPUs only and stores no scores.
    """

    block_bytes: int = CPU_BLOCK_BYTES
    min_heads: int = 1
    fused: bool = False


ON_CPU = AttentionLimits()


class Projections(NamedTuple):
    """Projections of a batch's hidden states. The queries are multiplied by the softmax scale."""

    absorbed_queries: mx.array | None  # (heads, generated tokens, kv_lora_rank + qk_rope); None without such tokens
    naive_queries: mx.array | None  # (heads, prompt tokens, qk_nope + qk_rope); None without such tokens
    cache_rows: mx.array  # (tokens, kv_lora_rank + qk_rope): rows to write to the cache


Project = Callable[[mx.array, mx.array, int, AttentionWeights], Projections]
"""(hidden (tokens, inputs), positions (tokens,), number of generated tokens, weights) -> Projections"""


def make_projections(config: ModelConfig, rotate: Rotate, bottleneck_eps: float = BOTTLENECK_NORM_EPS) -> Project:
    """Return the function that projects hidden states. ``bottleneck_eps`` is the epsilon of its norms."""
    heads, nope, kv_lora_rank = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
    query_dim, scale = config.qk_head_dim, config.softmax_scale

    def project(hidden: mx.array, positions: mx.array, num_generated: int, weights: AttentionWeights) -> Projections:
        queries = _project_queries(hidden, weights, bottleneck_eps).reshape(-1, heads, query_dim) * scale
        without_position = queries[..., :nope].swapaxes(0, 1)  # (heads, tokens, qk_nope)
        rotated = rotate(queries[..., nope:], positions).swapaxes(0, 1)
        compressed = multiply(hidden, weights.latent_down)
        latents = mx.fast.rms_norm(compressed[:, :kv_lora_rank], weights.latent_norm, bottleneck_eps)
        rotated_keys = rotate(compressed[:, None, kv_lora_rank:], positions).squeeze(1)
        absorbed_queries = naive_queries = None
        if num_generated > 0:
            in_latent_space = multiply(without_position[:, :num_generated], weights.key_up)
            absorbed_queries = mx.concatenate([in_latent_space, rotated[:, :num_generated]], axis=-1)
        if num_generated < hidden.shape[0]:
            naive_parts = [without_position[:, num_generated:], rotated[:, num_generated:]]
            naive_queries = mx.concatenate(naive_parts, axis=-1)
        return Projections(absorbed_queries, naive_queries, mx.concatenate([latents, rotated_keys], axis=-1))

    return project


def _project_queries(hidden: mx.array, weights: AttentionWeights, eps: float) -> mx.array:
    """Return the unscaled queries (tokens, heads * qk_head)."""
    query = weights.query
    if isinstance(query, LowRankQuery):
        bottleneck = mx.fast.rms_norm(multiply(hidden, query.down), query.norm, eps)
        return multiply(bottleneck, query.up)
    return multiply(hidden, query)


def attend_absorbed(
    queries: mx.array, keys: mx.array, position: int, kv_lora_rank: int, limits: AttentionLimits = ON_CPU
) -> mx.array:
    """Return the attention of absorbed ``queries`` (heads, count, row) to ``keys``, cached rows (keys, row).

    The first query is at ``position``. The result is (heads, count, kv_lora_rank); ``value_up`` projects it to values.
    """
    heads, count, _ = queries.shape

    def attend(block: slice) -> mx.array:
        scores = _hide_later_keys(queries[:, block] @ keys.T, position + block.start)
        return mx.softmax(scores, axis=-1, precise=True) @ keys[:, :kv_lora_rank]

    query_block = limits.block_bytes // (heads * _scores_bytes(keys.shape[0], queries.itemsize))
    return _in_blocks(attend, count, query_block, axis=1)


def fits_absorbed(heads: int, count: int, num_keys: int, item_bytes: int, limits: AttentionLimits = ON_CPU) -> bool:
    """Return whether `attend_absorbed` computes ``count`` queries in one block. Then it evaluates nothing."""
    return heads * count * _scores_bytes(num_keys, item_bytes) <= limits.block_bytes


class NaiveBlocks(NamedTuple):
    """The size of naive attention's blocks: heads, and queries of each head. ``fused``: the fused kernel is used."""

    heads: int
    queries: int
    fused: bool


def naive_blocks(
    heads: int, count: int, head_dim: int, position: int, item_bytes: int, limits: AttentionLimits
) -> NaiveBlocks:
    """Return the blocks for ``count`` queries of a prompt, the first at ``position``.

    The fused kernel is slower for a head of 192 values (MLX: sdpa_vector.cpp). It is used for a large first chunk,
    because it skips the half of the scores that is masked, and if too few queries fit into a block.
    """
    num_keys = position + count
    query_bytes = _scores_bytes(num_keys, item_bytes)
    rebuilt_bytes = rebuilt_bytes_per_head(num_keys, head_dim, item_bytes)
    head_block = max(limits.block_bytes // (rebuilt_bytes + count * query_bytes), min(limits.min_heads, heads))
    # A quarter is left to scores even if the keys and values of ``min_heads`` heads need more than the rest.
    left_bytes = max(limits.block_bytes - head_block * rebuilt_bytes, limits.block_bytes // 4)
    query_block = left_bytes // (head_block * query_bytes)
    is_large_first_chunk = position == 0 and heads * count * query_bytes > FUSED_FROM_BYTES
    if limits.fused and (is_large_first_chunk or query_block < min(count, _MIN_BLOCK_QUERIES)):
        return NaiveBlocks(max(limits.block_bytes // rebuilt_bytes, head_block), count, fused=True)
    return NaiveBlocks(head_block, query_block, fused=False)


def rebuilt_bytes_per_head(num_keys: int, head_dim: int, item_bytes: int) -> int:
    """Return the bytes of one head's rebuilt keys, twice (in two parts, and joined), and values, at most as wide."""
    return num_keys * 3 * head_dim * item_bytes


def attend_naive(
    queries: mx.array, cache_rows: mx.array, position: int, weights: AttentionWeights, limits: AttentionLimits = ON_CPU
) -> mx.array:
    """Return the attention (heads, count, v_head) of ``queries`` (heads, count, qk_head) to cached rows (keys, row).

    The first query is at ``position``. Heads, and the queries of each head, are processed in blocks (`naive_blocks`).
    """
    heads, count, head_dim = queries.shape
    blocks = naive_blocks(heads, count, head_dim, position, queries.itemsize, limits)

    def attend(block: slice) -> mx.array:
        key_up, value_up = some_heads(weights.key_up, block), some_heads(weights.value_up, block)
        keys, values = _rebuild(cache_rows, key_up, value_up, weights.latent_norm.size)
        if blocks.fused:
            return attend_fused(queries[block], keys, values, force=True)
        return attend_unfused(queries[block], keys, values, position, blocks.queries)

    return _in_blocks(attend, heads, blocks.heads, axis=0)


def _rebuild(cache_rows: mx.array, key_up: Matrix, value_up: Matrix, kv_lora_rank: int) -> tuple[mx.array, mx.array]:
    """Return keys (heads, keys, qk_head) and values (heads, keys, v_head) of cached rows (keys, row)."""
    latents, rotated = cache_rows[:, :kv_lora_rank], cache_rows[:, kv_lora_rank:]
    without_position = multiply_transposed(latents, key_up)
    rotated_per_head = mx.broadcast_to(rotated, (without_position.shape[0], *rotated.shape))
    return mx.concatenate([without_position, rotated_per_head], axis=-1), multiply(latents, value_up)


def attend_unfused(queries: mx.array, keys: mx.array, values: mx.array, position: int, query_block: int) -> mx.array:
    """Return the attention (heads, count, v_head) of queries (heads, count, qk_head), the first at ``position``.

    The keys are (heads, keys, qk_head), the values (heads, keys, v_head). ``query_block`` queries are processed at a
    time, with the keys up to the last of these queries.
    """

    def attend(block: slice) -> mx.array:
        end = position + block.stop
        scores = _hide_later_keys(queries[:, block] @ keys[:, :end].swapaxes(-1, -2), position + block.start)
        return mx.softmax(scores, axis=-1, precise=True) @ values[:, :end]

    return _in_blocks(attend, queries.shape[1], query_block, axis=1)


def attend_fused(queries: mx.array, keys: mx.array, values: mx.array, *, force: bool) -> mx.array:
    """Return the attention of `attend_unfused` by MLX's fused kernel, for queries at the last positions of the keys.

    Without ``force`` MLX chooses whether to use the kernel, which exists on GPUs only.
    """
    value_dim = values.shape[-1]  # the kernel requires values as wide as keys
    padded = mx.pad(values, [(0, 0), (0, 0), (0, keys.shape[-1] - value_dim)])
    attended = mx.fast.scaled_dot_product_attention(
        queries[None], keys[None], padded[None], scale=1.0, mask="causal", force_fused=force
    )
    return attended[0, ..., :value_dim]


def _hide_later_keys(scores: mx.array, position: int) -> mx.array:
    """Set to -inf the scores (heads, count, keys) of query i, at ``position`` + i, for keys after that position."""
    _, count, num_keys = scores.shape
    if position + 1 == num_keys:
        return scores
    queries = mx.arange(position, position + count)[:, None]
    return mx.where(mx.arange(num_keys) <= queries, scores, -mx.inf)


def _scores_bytes(num_keys: int, item_bytes: int) -> int:
    """Return the bytes of one query's scores in one head, as an operation's input and as its output."""
    return 2 * num_keys * item_bytes


def _in_blocks(compute: Callable[[slice], mx.array], num_items: int, block_items: int, axis: int) -> mx.array:
    """Return ``compute`` of all items, joined along ``axis``. It is called for ``block_items`` (at least 1) at a time.

    If there are several blocks, each is evaluated while the graph of the next one is built. Without that MLX would
    allocate memory for many blocks at once.
    """
    if num_items <= block_items:
        return compute(slice(0, num_items))
    outputs: list[mx.array] = []
    for start in range(0, num_items, max(1, block_items)):
        outputs.append(compute(slice(start, min(start + max(1, block_items), num_items))))
        mx.async_eval(outputs[-1])
        mx.eval(outputs[-2:-1])  # the block before is complete: at most two are in memory
    return mx.concatenate(outputs, axis)
