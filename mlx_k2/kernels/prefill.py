"""Dispatches of routed experts for many tokens: tiles of 32 (token, expert) pairs, sorted by expert. Runs no kernel."""

from typing import NamedTuple

import mlx.core as mx

from mlx_k2.kernels.decode import check_down, check_gate_up
from mlx_k2.kernels.dispatch import Dispatch, kernel_text
from mlx_k2.kernels.stack import ExpertStack

TILE = 32  # pairs per threadgroup, and columns in one half of its outputs
THREADS = 128  # per threadgroup


class SortedPairs(NamedTuple):
    """All (token, expert) pairs of a chunk, sorted by expert. The i-th expert of a token is the expert in slot i."""

    order: mx.array  # (pairs,) uint32: the number of each pair, token * top_k + slot
    offsets: mx.array  # (experts + 1,) int32: the pairs of expert e are order[offsets[e] : offsets[e + 1]]


def sort_pairs(expert_ids: mx.array, num_experts: int) -> SortedPairs:
    """Return the pairs sorted by expert. Pairs of the same expert are in the order of their tokens."""
    flat_ids = expert_ids.flatten()
    bounds = mx.arange(num_experts + 1, dtype=mx.uint32)
    num_pairs_below = (flat_ids[None, :] < bounds[:, None]).astype(mx.int32).sum(axis=1)
    return SortedPairs(order=mx.argsort(flat_ids), offsets=num_pairs_below)


def max_tiles(num_pairs: int, num_experts: int) -> int:
    """Return an upper bound of the number of tiles for any distribution of the pairs over the experts."""
    return num_pairs // TILE + min(num_pairs, num_experts)


def gate_up(x: mx.array, expert_ids: mx.array, pairs: SortedPairs, stack: ExpertStack) -> Dispatch:
    """Return the dispatch of silu(gate) * up: x (tokens, hidden) -> (pairs, intermediate), in the order of pairs."""
    check_gate_up(x, expert_ids, stack)
    _check_pairs(pairs, expert_ids, stack)
    outputs = stack.intermediate_size
    return Dispatch(
        kernel_text(
            "prefill_gate_up",
            ("x", "gate_packed", "gate_scale", "up_packed", "up_scale", "order", "offsets"),
            ("hidden",),
            "prefill_tile.metal",
        ),
        (x, stack.gate_packed, stack.gate_scale, stack.up_packed, stack.up_scale, *pairs),
        (("T", x.dtype), ("K", x.shape[1]), ("N", outputs), ("E", stack.num_experts), ("TOPK", expert_ids.shape[1])),
        grid=(outputs // TILE * THREADS, max_tiles(expert_ids.size, stack.num_experts), 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=((expert_ids.size, outputs),),
        output_dtypes=(x.dtype,),
    )


def down(hidden: mx.array, expert_weights: mx.array, pairs: SortedPairs, stack: ExpertStack) -> Dispatch:
    """Return the dispatch of each pair's weighted output.

    hidden (pairs, intermediate), in the order of ``pairs`` -> (tokens, top_k, hidden) float32.
    The outputs are float32: to round each to bfloat16 before a token's are summed would be the layer's largest error.
    """
    tokens, top_k = expert_weights.shape
    check_down(hidden.reshape(tokens, top_k, -1), expert_weights, stack)
    _check_pairs(pairs, expert_weights, stack)
    outputs = stack.hidden_size
    return Dispatch(
        kernel_text(
            "prefill_down",
            ("hidden", "down_packed", "down_scale", "expert_weights", "order", "offsets"),
            ("parts",),
            "prefill_tile.metal",
        ),
        (hidden, stack.down_packed, stack.down_scale, expert_weights.flatten(), *pairs),
        (("T", hidden.dtype), ("K", hidden.shape[1]), ("N", outputs), ("E", stack.num_experts)),
        grid=(-(-outputs // (2 * TILE)) * THREADS, max_tiles(expert_weights.size, stack.num_experts), 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=((tokens, top_k, outputs),),
        output_dtypes=(mx.float32,),
    )


def combine(parts: mx.array, dtype: mx.Dtype) -> Dispatch:
    """Return the dispatch that sums the outputs of `down` for each token.

    parts (tokens, top_k, hidden) float32, summed in the order of slots -> (tokens, hidden) ``dtype``.
    """
    tokens, top_k, outputs = parts.shape
    assert outputs % TILE == 0, f"{outputs} outputs"
    return Dispatch(
        kernel_text("prefill_combine", ("parts",), ("y",), None),
        (parts,),
        (("T", dtype), ("N", outputs), ("TOPK", top_k)),
        grid=(outputs, tokens, 1),
        threadgroup=(TILE, 1, 1),
        output_shapes=((tokens, outputs),),
        output_dtypes=(dtype,),
    )


def _check_pairs(pairs: SortedPairs, expert_ids: mx.array, stack: ExpertStack) -> None:
    assert pairs.order.shape == (expert_ids.size,), f"{pairs.order.shape} sorted pairs of {expert_ids.shape}"
    assert pairs.order.dtype == mx.uint32, f"order is {pairs.order.dtype}"
    assert pairs.offsets.shape == (stack.num_experts + 1,), f"offsets are {pairs.offsets.shape}"
    assert pairs.offsets.dtype == mx.int32, f"offsets are {pairs.offsets.dtype}"
