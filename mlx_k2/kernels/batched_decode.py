"""Dispatches for 2 to 16 tokens: each chosen expert is read once for all its tokens. Runs no kernel itself."""

import mlx.core as mx

from mlx_k2.kernels.decode import SIMD_WIDTH, check_down, check_gate_up, check_ids
from mlx_k2.kernels.dispatch import Dispatch, kernel_text
from mlx_k2.kernels.stack import ExpertStack

MAX_TOKENS = 16


def capacity(tokens: int) -> int:
    """Return the tokens that a compiled kernel has registers for: 2, 4, 8 or 16, so that few kernels are compiled."""
    assert 1 <= tokens <= MAX_TOKENS, f"{tokens} tokens"
    return max(2, 1 << (tokens - 1).bit_length())


def gate_up(
    x: mx.array, expert_ids: mx.array, stack: ExpertStack, *, rows_per_simdgroup: int, simdgroups: int
) -> Dispatch:
    """Return the dispatch of silu(gate) * up: x (tokens, hidden) -> (tokens, top_k, intermediate).

    A simdgroup computes ``rows_per_simdgroup`` rows of gate and of up; a threadgroup has ``simdgroups`` simdgroups.
    """
    check_gate_up(x, expert_ids, stack)
    tokens, top_k = expert_ids.shape
    outputs = stack.intermediate_size
    assert outputs % (rows_per_simdgroup * simdgroups) == 0, (
        f"{outputs} rows in threadgroups of {simdgroups} x {rows_per_simdgroup}"
    )
    return Dispatch(
        kernel_text(
            "batch_gate_up",
            ("x", "gate_packed", "gate_scale", "up_packed", "up_scale", "expert_ids"),
            ("hidden",),
            "int4.metal",
        ),
        (x, stack.gate_packed, stack.gate_scale, stack.up_packed, stack.up_scale, expert_ids),
        (
            ("T", x.dtype),
            ("K", x.shape[1]),
            ("N", outputs),
            ("TOPK", top_k),
            ("R", rows_per_simdgroup),
            ("CAP", capacity(tokens)),
        ),
        grid=(SIMD_WIDTH, outputs // rows_per_simdgroup, tokens * top_k),
        threadgroup=(SIMD_WIDTH, simdgroups, 1),
        output_shapes=((tokens, top_k, outputs),),
        output_dtypes=(x.dtype,),
    )


def down(
    hidden: mx.array,
    expert_ids: mx.array,
    expert_weights: mx.array,
    stack: ExpertStack,
    *,
    rows_per_simdgroup: int,
    simdgroups: int,
) -> Dispatch:
    """Return the dispatch of the experts' weighted sum: hidden (tokens, top_k, intermediate) -> (tokens, hidden)."""
    check_ids(expert_ids)
    check_down(hidden, expert_weights, stack)
    tokens, top_k = expert_ids.shape
    outputs = stack.hidden_size
    assert outputs % rows_per_simdgroup == 0, f"{outputs} rows in steps of {rows_per_simdgroup}"
    return Dispatch(
        kernel_text(
            "batch_down", ("hidden", "down_packed", "down_scale", "expert_ids", "expert_weights"), ("y",), "int4.metal"
        ),
        (hidden, stack.down_packed, stack.down_scale, expert_ids, expert_weights),
        (
            ("T", hidden.dtype),
            ("K", hidden.shape[2]),
            ("N", outputs),
            ("TOPK", top_k),
            ("R", rows_per_simdgroup),
            ("CAP", capacity(tokens)),
        ),
        grid=(SIMD_WIDTH, simdgroups, outputs // rows_per_simdgroup),
        threadgroup=(SIMD_WIDTH, simdgroups, 1),
        output_shapes=((tokens, outputs),),
        output_dtypes=(hidden.dtype,),
    )
