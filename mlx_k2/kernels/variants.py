"""Routing and routed experts composed of kernel launches, one function for each regime. Chooses no regime itself.

Each function takes `perform`, what runs a launch: `launch.run` in the program, an executor on the CPU in the tests.
"""

from collections.abc import Callable

import mlx.core as mx

from mlx_k2.kernels import batched_decode, decode, prefill, router
from mlx_k2.kernels.dispatch import Dispatch, run
from mlx_k2.kernels.stack import ExpertStack
from mlx_k2.kernels.tuning import Tuning

Perform = Callable[[Dispatch], list[mx.array]]
Experts = Callable[[mx.array, mx.array, mx.array, ExpertStack, Tuning, Perform], mx.array]


def decode_experts(
    x: mx.array,
    expert_ids: mx.array,
    expert_weights: mx.array,
    stack: ExpertStack,
    tuning: Tuning,
    perform: Perform = run,
) -> mx.array:
    """One token, two launches. Right for more tokens too, but then an expert is read once for each of them."""
    (hidden,) = perform(
        decode.gate_up(
            x, expert_ids, stack, rows_per_simdgroup=tuning.gate_up_rows, simdgroups=tuning.gate_up_simdgroups
        )
    )
    (y,) = perform(decode.down(hidden, expert_ids, expert_weights, stack, rows_per_simdgroup=tuning.down_rows))
    return y


def batch_experts(
    x: mx.array,
    expert_ids: mx.array,
    expert_weights: mx.array,
    stack: ExpertStack,
    tuning: Tuning,
    perform: Perform = run,
) -> mx.array:
    """Up to `batched_decode.MAX_TOKENS` tokens, two launches, every chosen expert read once."""
    rows_per_simdgroup = (
        tuning.batch_rows if x.shape[0] <= batched_decode.MAX_TOKENS // 2 else max(1, tuning.batch_rows // 2)
    )  # registers
    simdgroups = tuning.batch_simdgroups
    (hidden,) = perform(
        batched_decode.gate_up(
            x, expert_ids, stack, rows_per_simdgroup=rows_per_simdgroup, simdgroups=tuning.gate_up_simdgroups
        )
    )
    (y,) = perform(
        batched_decode.down(
            hidden, expert_ids, expert_weights, stack, rows_per_simdgroup=rows_per_simdgroup, simdgroups=simdgroups
        )
    )
    return y


def prefill_experts(
    x: mx.array,
    expert_ids: mx.array,
    expert_weights: mx.array,
    stack: ExpertStack,
    tuning: Tuning,  # noqa: ARG001  the tile is fixed; every variant has the same arguments
    perform: Perform = run,
) -> mx.array:
    """Any number of tokens: sort the pairs by expert, three launches, add up."""
    pairs = prefill.sort_pairs(expert_ids, stack.num_experts)
    (hidden,) = perform(prefill.gate_up(x, expert_ids, pairs, stack))
    (parts,) = perform(prefill.down(hidden, expert_weights, pairs, stack))
    (y,) = perform(prefill.combine(parts, x.dtype))
    return y


def route(
    hidden: mx.array,
    router_weight: mx.array,
    correction_bias: mx.array,
    *,
    top_k: int,
    normalize: bool,
    scaling_factor: float,
    perform: Perform = run,
) -> tuple[mx.array, mx.array]:
    """`reference.route` for one group of experts: two launches for few tokens; for many, a product and one launch."""
    if hidden.shape[0] <= batched_decode.MAX_TOKENS:
        (logits,) = perform(router.logits(hidden, router_weight))
    else:
        logits = hidden.astype(mx.float32) @ router_weight.astype(mx.float32).T
    expert_ids, weights = perform(
        router.select(logits, correction_bias, top_k=top_k, normalize=normalize, scaling_factor=scaling_factor)
    )
    return expert_ids, weights
