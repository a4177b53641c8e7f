"""The one place that chooses how routing and routed experts are computed. Today: always the reference."""

import mlx.core as mx

from mlx_k2.kernels import reference
from mlx_k2.kernels.stack import ExpertStack

__all__ = ["ExpertStack", "route", "routed_experts"]


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
    """Chooses experts: hidden (tokens, hidden) -> ids (tokens, top_k) uint32, weights (tokens, top_k) float32.

    `reference.route` states the rule.
    """
    return reference.route(
        hidden,
        router_weight,
        correction_bias,
        top_k=top_k,
        num_groups=num_groups,
        top_groups=top_groups,
        normalize=normalize,
        scaling_factor=scaling_factor,
    )


def routed_experts(x: mx.array, expert_ids: mx.array, expert_weights: mx.array, stack: ExpertStack) -> mx.array:
    """(tokens, hidden) -> (tokens, hidden): SwiGLU of the chosen experts, weighted, summed in the order of the ids."""
    return reference.routed_experts(x, expert_ids, expert_weights, stack)
