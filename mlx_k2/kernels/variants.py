"""Routing and routed experts as sequences of kernel dispatches, one function for each kernel. Chooses no kernel.

The argument `perform` executes a dispatch: `dispatch.run` in the program, a CPU executor in the tests.
"""

from collections.abc import Callable

import mlx.core as mx

from mlx_k2.kernels import decode, prefill, router
from mlx_k2.kernels.dispatch import Dispatch, run
from mlx_k2.kernels.reference import RouterRule
from mlx_k2.kernels.stack import ExpertStack
from mlx_k2.kernels.tuning import Tuning

Perform = Callable[[Dispatch], list[mx.array]]
Experts = Callable[[mx.array, mx.array, mx.array, ExpertStack, Tuning, Perform], mx.array]
"""One of the functions for routed experts in this module."""


def decode_experts(
    x: mx.array,
    expert_ids: mx.array,
    expert_weights: mx.array,
    stack: ExpertStack,
    tuning: Tuning,
    perform: Perform = run,
) -> mx.array:
    """Run the experts of one token in two dispatches.

    More tokens are possible, but then an expert's weights are read once for each of its tokens.
    """
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
    """Run the experts of up to `decode.MAX_TOKENS` tokens in two dispatches. Read each chosen expert once."""
    # from 9 tokens on half the rows: a thread's registers hold rows x capacity(tokens) sums
    rows = tuning.batch_rows if x.shape[0] <= decode.MAX_TOKENS // 2 else max(1, tuning.batch_rows // 2)
    gate_up = decode.gate_up(
        x, expert_ids, stack, rows_per_simdgroup=rows, simdgroups=tuning.gate_up_simdgroups, is_batch=True
    )
    (hidden,) = perform(gate_up)
    down = decode.down(
        hidden,
        expert_ids,
        expert_weights,
        stack,
        rows_per_simdgroup=rows,
        batch_simdgroups=tuning.batch_simdgroups,
    )
    (y,) = perform(down)
    return y


def prefill_experts(
    x: mx.array,
    expert_ids: mx.array,
    expert_weights: mx.array,
    stack: ExpertStack,
    tuning: Tuning,  # noqa: ARG001  the tile is fixed; every variant has the same arguments
    perform: Perform = run,
) -> mx.array:
    """Run the experts of any number of tokens: sort the pairs by expert, then run three dispatches."""
    pairs = prefill.sort_pairs(expert_ids, stack.num_experts)
    (hidden,) = perform(prefill.gate_up(x, expert_ids, pairs, stack))
    (parts,) = perform(prefill.down(hidden, expert_weights, pairs, stack))
    (y,) = perform(prefill.combine(parts, x.dtype))
    return y


def route(
    hidden: mx.array,
    router_weight: mx.array,
    correction_bias: mx.array,
    rule: RouterRule,
    perform: Perform = run,
) -> tuple[mx.array, mx.array]:
    """Compute `reference.route` for a single group of experts.

    Up to `decode.MAX_TOKENS` tokens take two dispatches; more take a matrix product and one dispatch.
    """
    if hidden.shape[0] <= decode.MAX_TOKENS:
        (logits,) = perform(router.logits(hidden, router_weight))
    else:
        logits = hidden.astype(mx.float32) @ router_weight.astype(mx.float32).T
    expert_ids, weights = perform(router.select(logits, correction_bias, rule))
    return expert_ids, weights
