"""Routing and routed experts in plain MLX: what every kernel must equal, and what runs where no kernel does.

All of it is lazy. In float32 on a CPU a token's output is bit-identical whatever other tokens are in the call: each
output element is one dot product that MLX computes in the same order for one row as for many.
"""

import mlx.core as mx

from mlx_k2.kernels.stack import BITS, GROUP_SIZE, ZERO_POINT, AffineStack, ExpertStack

SORT_FROM_PAIRS = 64
"""From this many (token, expert) pairs on they are sorted by expert, so that a GPU reads an expert's weights once."""


FEW_OF_STACK = 8
"""Up to one in so many of a stack's experts are copied out of it to get their biases; for more, all get theirs."""


def route(
    hidden: mx.array,
    router_weight: mx.array,
    correction_bias: mx.array,
    *,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scaling_factor: float,
) -> tuple[mx.array, mx.array]:
    """DeepSeek-V3's bias-corrected ("noaux_tc") choice of experts, in float32.

    hidden (tokens, hidden), router_weight (experts, hidden), correction_bias (experts,) float32
    -> expert ids (tokens, top_k) uint32, best first, and their weights (tokens, top_k) float32.
    The bias takes part in the choice only. Of two equal scores the lower expert id comes first.
    """
    logits = hidden.astype(mx.float32) @ router_weight.astype(mx.float32).T
    return select_experts(
        logits,
        correction_bias,
        top_k=top_k,
        num_groups=num_groups,
        top_groups=top_groups,
        normalize=normalize,
        scaling_factor=scaling_factor,
    )


def select_experts(
    logits: mx.array,
    correction_bias: mx.array,
    *,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scaling_factor: float,
) -> tuple[mx.array, mx.array]:
    """The second half of `route`: logits (tokens, experts) float32 -> ids and weights, both (tokens, top_k)."""
    scores = mx.sigmoid(logits)
    biased = scores + correction_bias
    if top_groups < num_groups:
        biased = _keep_best_groups(biased, num_groups, top_groups)
    expert_ids = mx.argsort(-biased, axis=-1)[:, :top_k]
    weights = mx.take_along_axis(scores, expert_ids, axis=-1)
    if normalize and top_k > 1:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    if scaling_factor != 1.0:
        weights = weights * scaling_factor
    return expert_ids, weights


def _keep_best_groups(biased: mx.array, num_groups: int, top_groups: int) -> mx.array:
    """Sets the scores of all but the best groups to 0, as the published model does (not to minus infinity)."""
    grouped = biased.reshape(biased.shape[0], num_groups, -1)
    group_scores = mx.topk(grouped, 2, axis=-1).sum(axis=-1, keepdims=True)  # (tokens, groups, 1)
    dropped = mx.argsort(group_scores, axis=1)[:, : num_groups - top_groups]
    return mx.put_along_axis(grouped, dropped, mx.array(0.0), axis=1).reshape(biased.shape)


def routed_experts(
    x: mx.array, expert_ids: mx.array, expert_weights: mx.array, stack: ExpertStack | AffineStack
) -> mx.array:
    """The chosen experts' SwiGLU outputs, weighted and summed in the order of expert_ids.

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
    """(..., 1, hidden) rows for (...) expert ids -> (..., 1, hidden)."""

    def project(inputs: mx.array, packed: mx.array, scale: mx.array, bias: mx.array | None) -> mx.array:
        if bias is None and expert_ids.size * FEW_OF_STACK <= packed.shape[0]:
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

    # MLX's affine product asks for biases; those that are not held are made in the call, and gone after it
    experts, gate_bias, up_bias, down_bias = stack if isinstance(stack, AffineStack) else (stack, None, None, None)
    gate = project(inputs, experts.gate_packed, experts.gate_scale, gate_bias)
    up = project(inputs, experts.up_packed, experts.up_scale, up_bias)
    return project(gate * mx.sigmoid(gate) * up, experts.down_packed, experts.down_scale, down_bias)
