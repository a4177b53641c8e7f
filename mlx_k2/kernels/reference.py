"""Routing and routed experts in plain MLX: the reference for every kernel, and the computation where none is used.

All functions are lazy. In float32 on a CPU a token's output has the same bits with any other tokens in the call: each
output element is one dot product, which MLX computes in the same order for one row as for many.
"""

from typing import NamedTuple

import mlx.core as mx

from mlx_k2.kernels.stack import BITS, GROUP_SIZE, ZERO_POINT, AffineStack, ExpertStack

SORT_FROM_PAIRS = 64
"""Fewest (token, expert) pairs that are sorted by expert. If they are sorted, a GPU reads an expert's weights once."""

COPY_FROM_EXPERTS_PER_PAIR = 8
"""Smallest ratio of experts in the stack to (token, expert) pairs at which the pairs' experts are copied out of the
stack, so that biases are computed for the copies and not for the whole stack."""


class RouterRule(NamedTuple):
    """The parameters of a router, which chooses the best ``top_k`` experts in the best ``top_groups`` groups.

    With ``normalize`` the weights of several experts are divided by their sum. Then all weights are multiplied by
    ``scaling_factor``.
    """

    top_k: int
    normalize: bool
    scaling_factor: float
    num_groups: int = 1
    top_groups: int = 1


def route(
    hidden: mx.array, router_weight: mx.array, correction_bias: mx.array, rule: RouterRule
) -> tuple[mx.array, mx.array]:
    """Choose experts by DeepSeek-V3's bias-corrected rule ("noaux_tc"), in float32.

    hidden (tokens, hidden), router_weight (experts, hidden), correction_bias (experts,) float32
    -> expert ids (tokens, top_k) uint32, best first, and their weights (tokens, top_k) float32.
    The bias affects the choice only, not the weights. Of two equal scores the lower expert id comes first.
    """
    logits = hidden.astype(mx.float32) @ router_weight.astype(mx.float32).T
    return select_experts(logits, correction_bias, rule)


def select_experts(logits: mx.array, correction_bias: mx.array, rule: RouterRule) -> tuple[mx.array, mx.array]:
    """Choose experts by their logits, as `route` does: logits (tokens, experts) -> ids, weights (tokens, top_k)."""
    scores = mx.sigmoid(logits)
    biased = scores + correction_bias
    if rule.top_groups < rule.num_groups:
        biased = _keep_best_groups(biased, rule.num_groups, rule.top_groups)
    expert_ids = mx.argsort(-biased, axis=-1)[:, : rule.top_k]
    weights = mx.take_along_axis(scores, expert_ids, axis=-1)
    if rule.normalize and rule.top_k > 1:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    if rule.scaling_factor != 1.0:
        weights = weights * rule.scaling_factor
    return expert_ids, weights


def _keep_best_groups(biased: mx.array, num_groups: int, top_groups: int) -> mx.array:
    """Set the scores of all but the best groups to 0 (not to minus infinity), as the published model does.

    A group's score is the sum of its two best experts' scores.
    """
    grouped = biased.reshape(biased.shape[0], num_groups, -1)
    group_scores = mx.topk(grouped, 2, axis=-1).sum(axis=-1, keepdims=True)  # (tokens, groups, 1)
    dropped = mx.argsort(group_scores, axis=1)[:, : num_groups - top_groups]
    return mx.put_along_axis(grouped, dropped, mx.array(0.0), axis=1).reshape(biased.shape)


def routed_experts(
    x: mx.array, expert_ids: mx.array, expert_weights: mx.array, stack: ExpertStack | AffineStack
) -> mx.array:
    """Return the chosen experts' SwiGLU outputs, weighted and summed in the order of expert_ids.

    x (tokens, hidden), expert_ids (tokens, top_k) uint32, expert_weights (tokens, top_k) float32 -> (tokens, hidden).
    """
    if expert_ids.size >= SORT_FROM_PAIRS:
        outputs = _sorted_outputs(x, expert_ids, stack)
    else:
        inputs = x[:, None, None, :]  # (tokens, 1, 1, hidden): one row for each expert of the token
        outputs = _swiglu_experts(inputs, expert_ids, stack)
    outputs = outputs.squeeze(-2).astype(mx.float32)  # (tokens, top_k, hidden)
    return (expert_weights[:, None, :] @ outputs).squeeze(1).astype(x.dtype)


def _sorted_outputs(x: mx.array, expert_ids: mx.array, stack: ExpertStack | AffineStack) -> mx.array:
    flat_ids = expert_ids.flatten()
    order = mx.argsort(flat_ids)
    inputs = x[order // expert_ids.shape[1]][:, None, :]  # (pairs, 1, hidden)
    outputs = _swiglu_experts(inputs, flat_ids[order], stack, sorted_indices=True)
    return outputs[mx.argsort(order)].reshape(*expert_ids.shape, 1, -1)


def _swiglu_experts(
    inputs: mx.array, expert_ids: mx.array, stack: ExpertStack | AffineStack, *, sorted_indices: bool = False
) -> mx.array:
    """Return the SwiGLU of inputs (..., 1, hidden) with the experts expert_ids (...): (..., 1, hidden)."""

    def project(inputs: mx.array, packed: mx.array, scale: mx.array, bias: mx.array | None) -> mx.array:
        if bias is None and packed.shape[0] >= COPY_FROM_EXPERTS_PER_PAIR * expert_ids.size:
            scale = scale[expert_ids].astype(inputs.dtype)
            return mx.quantized_matmul(
                inputs, packed[expert_ids], scale, scale * -ZERO_POINT, group_size=GROUP_SIZE, bits=BITS
            )
        scale = scale.astype(inputs.dtype)
        return mx.gather_qmm(
            inputs,
            packed,
            scale,
            scale * -ZERO_POINT if bias is None else bias,
            rhs_indices=expert_ids,
            group_size=GROUP_SIZE,
            bits=BITS,
            sorted_indices=sorted_indices,
        )

    # MLX's affine product requires biases; an ExpertStack has none, so they are computed and freed in this call
    experts, gate_bias, up_bias, down_bias = stack if isinstance(stack, AffineStack) else (stack, None, None, None)
    gate = project(inputs, experts.gate_packed, experts.gate_scale, gate_bias)
    up = project(inputs, experts.up_packed, experts.up_scale, up_bias)
    return project(gate * mx.sigmoid(gate) * up, experts.down_packed, experts.down_scale, down_bias)
