"""The second half of a decoder layer: a dense SwiGLU block, or routed experts beside a shared one."""

from collections.abc import Callable

import mlx.core as mx

from mlx_k2.config import ModelConfig
from mlx_k2.kernels.experts import route, routed_experts
from mlx_k2.model.layer_weights import DenseWeights, MoeWeights
from mlx_k2.model.linear import multiply

FeedForward = Callable[[mx.array, DenseWeights | MoeWeights], mx.array]


def make_feed_forward(config: ModelConfig) -> FeedForward:
    """The function (hidden (tokens, hidden), weights) -> (tokens, hidden) for both kinds of layer."""

    def feed_forward(hidden: mx.array, weights: DenseWeights | MoeWeights) -> mx.array:
        if isinstance(weights, DenseWeights):
            return swiglu(hidden, weights)
        expert_ids, expert_weights = route(
            hidden,
            weights.router,
            weights.correction_bias,
            top_k=config.num_experts_per_tok,
            num_groups=config.n_group,
            top_groups=config.topk_group,
            normalize=config.norm_topk_prob,
            scaling_factor=config.routed_scaling_factor,
        )
        output = routed_experts(hidden, expert_ids, expert_weights, weights.experts)
        return output if weights.shared is None else output + swiglu(hidden, weights.shared)

    return feed_forward


def swiglu(hidden: mx.array, weights: DenseWeights) -> mx.array:
    """down(silu(gate(x)) * up(x)): (tokens, hidden) -> (tokens, hidden)."""
    gate = multiply(hidden, weights.gate)
    return multiply(gate * mx.sigmoid(gate) * multiply(hidden, weights.up), weights.down)
