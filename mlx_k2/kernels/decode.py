"""Dispatches of routed experts for up to 16 tokens. Runs no kernel.

The decode kernels read an expert's weights once for each of its tokens, the batch kernels once for all of its tokens.
"""

import mlx.core as mx

from mlx_k2.kernels.dispatch import Dispatch, TemplateValue, kernel_text
from mlx_k2.kernels.stack import CODES_PER_WORD, GROUP_SIZE, ExpertStack

SIMD_WIDTH = 32
MAX_TOP_K = 32  # one simdgroup of 32 threads per expert, at most 1024 threads per threadgroup
MAX_TOKENS = 16  # of the batch kernels


def capacity(tokens: int) -> int:
    """Return for how many tokens a batch kernel is compiled: 2, 4, 8 or 16. Few sizes need few compilations."""
    assert 1 <= tokens <= MAX_TOKENS, f"{tokens} tokens"
    return max(2, 1 << (tokens - 1).bit_length())


def gate_up(
    x: mx.array,
    expert_ids: mx.array,
    stack: ExpertStack,
    *,
    rows_per_simdgroup: int,
    simdgroups: int,
    is_batch: bool = False,
) -> Dispatch:
    """Return the dispatch of the chosen experts' silu(gate) * up: x (tokens, hidden) -> (tokens, top_k, intermediate).

    A simdgroup computes ``rows_per_simdgroup`` rows of gate and of up; a threadgroup has ``simdgroups`` simdgroups.
    """
    check_gate_up(x, expert_ids, stack)
    outputs = stack.intermediate_size
    assert outputs % (rows_per_simdgroup * simdgroups) == 0, (
        f"{outputs} rows in threadgroups of {simdgroups} x {rows_per_simdgroup}"
    )
    return Dispatch(
        kernel_text(
            "batch_gate_up" if is_batch else "decode_gate_up",
            ("x", "gate_packed", "gate_scale", "up_packed", "up_scale", "expert_ids"),
            ("hidden",),
            "int4.metal",
        ),
        (x, stack.gate_packed, stack.gate_scale, stack.up_packed, stack.up_scale, expert_ids),
        _template(x, outputs, expert_ids, rows_per_simdgroup, is_batch),
        grid=(SIMD_WIDTH, outputs // rows_per_simdgroup, expert_ids.size),
        threadgroup=(SIMD_WIDTH, simdgroups, 1),
        output_shapes=((*expert_ids.shape, outputs),),
        output_dtypes=(x.dtype,),
    )


def down(
    hidden: mx.array,
    expert_ids: mx.array,
    expert_weights: mx.array,
    stack: ExpertStack,
    *,
    rows_per_simdgroup: int,
    batch_simdgroups: int | None = None,
) -> Dispatch:
    """Return the dispatch of the experts' weighted sum: hidden (tokens, top_k, intermediate) -> (tokens, hidden).

    ``batch_simdgroups`` is the number of simdgroups in a threadgroup of the batch kernel; None: use the decode kernel.
    """
    check_ids(expert_ids)
    check_down(hidden, expert_weights, stack)
    tokens, top_k = expert_ids.shape
    outputs = stack.hidden_size
    assert outputs % rows_per_simdgroup == 0, f"{outputs} rows in steps of {rows_per_simdgroup}"
    is_batch = batch_simdgroups is not None
    simdgroups = batch_simdgroups or top_k
    return Dispatch(
        kernel_text(
            "batch_down" if is_batch else "decode_down",
            ("hidden", "down_packed", "down_scale", "expert_ids", "expert_weights"),
            ("y",),
            "int4.metal",
        ),
        (hidden, stack.down_packed, stack.down_scale, expert_ids, expert_weights),
        _template(hidden, outputs, expert_ids, rows_per_simdgroup, is_batch),
        grid=(SIMD_WIDTH, simdgroups, (1 if is_batch else tokens) * (outputs // rows_per_simdgroup)),
        threadgroup=(SIMD_WIDTH, simdgroups, 1),
        output_shapes=((tokens, outputs),),
        output_dtypes=(hidden.dtype,),
    )


def _template(
    inputs: mx.array, outputs: int, expert_ids: mx.array, rows_per_simdgroup: int, is_batch: bool
) -> tuple[tuple[str, TemplateValue], ...]:
    """Return the template arguments, which the kernel's text explains."""
    tokens, top_k = expert_ids.shape
    common = (("T", inputs.dtype), ("K", inputs.shape[-1]), ("N", outputs), ("TOPK", top_k), ("R", rows_per_simdgroup))
    return (*common, ("CAP", capacity(tokens))) if is_batch else common


def check_gate_up(x: mx.array, expert_ids: mx.array, stack: ExpertStack) -> None:
    """Assert the shapes and dtypes that the gate and up kernels require. The kernels themselves check nothing."""
    experts, outputs, words = stack.gate_packed.shape
    inputs = words * CODES_PER_WORD
    assert x.ndim == 2, f"x is {x.shape}, not (tokens, hidden)"
    assert x.shape == (expert_ids.shape[0], inputs), f"x is {x.shape} for {expert_ids.shape} ids and {inputs} inputs"
    check_ids(expert_ids)
    _check_projection(stack.gate_packed, stack.gate_scale, (experts, outputs, inputs), x.dtype)
    _check_projection(stack.up_packed, stack.up_scale, (experts, outputs, inputs), x.dtype)


def check_down(hidden: mx.array, expert_weights: mx.array, stack: ExpertStack) -> None:
    """Assert the shapes and dtypes that the down kernels require; hidden is (tokens, top_k, intermediate)."""
    experts, outputs, words = stack.down_packed.shape
    inputs = words * CODES_PER_WORD
    assert hidden.shape == (*expert_weights.shape, inputs), f"hidden is {hidden.shape}, weights {expert_weights.shape}"
    assert expert_weights.dtype == mx.float32, f"expert weights are {expert_weights.dtype}"
    _check_projection(stack.down_packed, stack.down_scale, (experts, outputs, inputs), hidden.dtype)


def check_ids(expert_ids: mx.array) -> None:
    """Assert that expert ids are (tokens, top_k) uint32, with top_k at most MAX_TOP_K."""
    assert expert_ids.ndim == 2, f"expert ids are {expert_ids.shape}, not (tokens, top_k)"
    assert expert_ids.dtype == mx.uint32, f"expert ids are {expert_ids.dtype}"
    assert expert_ids.shape[1] <= MAX_TOP_K, f"{expert_ids.shape[1]} experts for a token"


def _check_projection(packed: mx.array, scale: mx.array, shape: tuple[int, int, int], dtype: mx.Dtype) -> None:
    experts, outputs, inputs = shape
    assert inputs % GROUP_SIZE == 0, f"{inputs} inputs"
    assert outputs % GROUP_SIZE == 0, f"{outputs} outputs"
    assert packed.shape == (experts, outputs, inputs // CODES_PER_WORD), f"packed weights are {packed.shape}"
    assert scale.shape == (experts, outputs, inputs // GROUP_SIZE), f"scales are {scale.shape}"
    assert packed.dtype == mx.uint32, f"packed weights are {packed.dtype}"
    assert scale.dtype == dtype, f"scales are {scale.dtype}, activations {dtype}"
