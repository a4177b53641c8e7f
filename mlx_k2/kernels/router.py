"""Dispatches of the router: float32 logits of a few tokens, and the choice of experts. Runs no kernel."""

import mlx.core as mx

from mlx_k2.kernels.decode import MAX_TOKENS, MAX_TOP_K, SIMD_WIDTH, capacity
from mlx_k2.kernels.dispatch import Dispatch, kernel_text
from mlx_k2.kernels.reference import RouterRule


def logits(hidden: mx.array, router_weight: mx.array) -> Dispatch:
    """Return the dispatch of hidden (tokens, hidden) @ router_weight (experts, hidden).T: (tokens, experts) float32."""
    tokens, inputs = hidden.shape
    experts = router_weight.shape[0]
    assert tokens <= MAX_TOKENS, f"{tokens} tokens"
    assert router_weight.shape == (experts, inputs), f"router is {router_weight.shape}, hidden {hidden.shape}"
    assert router_weight.dtype == hidden.dtype, f"router is {router_weight.dtype}, hidden {hidden.dtype}"
    assert inputs % 32 == 0, f"{inputs} inputs"
    return Dispatch(
        kernel_text("router_logits", ("hidden", "router_weight"), ("logits",), "int4.metal"),
        (hidden, router_weight),
        (("T", hidden.dtype), ("K", inputs), ("E", experts), ("CAP", 1 if tokens == 1 else capacity(tokens))),
        grid=(SIMD_WIDTH, experts, 1),
        threadgroup=(SIMD_WIDTH, 2 if experts % 2 == 0 else 1, 1),  # simdgroups must divide the experts
        output_shapes=((tokens, experts),),
        output_dtypes=(mx.float32,),
    )


def select(logits: mx.array, correction_bias: mx.array, rule: RouterRule) -> Dispatch:
    """Return the dispatch that chooses experts by `reference.select_experts`, for a single group of experts.

    logits (tokens, experts) float32 -> ids (tokens, top_k) uint32, best first, and weights (tokens, top_k) float32.
    """
    tokens, experts = logits.shape
    assert logits.dtype == mx.float32, f"logits are {logits.dtype}"
    assert correction_bias.shape == (experts,), f"bias is {correction_bias.shape} for {experts} experts"
    assert correction_bias.dtype == mx.float32, f"bias is {correction_bias.dtype}"
    top_k = rule.top_k
    assert top_k <= min(experts, MAX_TOP_K), f"{top_k} of {experts} experts"
    return Dispatch(
        kernel_text("router_select", ("logits", "correction_bias", "scaling"), ("ids", "weights"), "int4.metal"),
        (logits, correction_bias, mx.array([rule.scaling_factor], dtype=mx.float32)),
        (("E", experts), ("TOPK", top_k), ("NORMALIZE", rule.normalize and top_k > 1)),
        grid=(SIMD_WIDTH, tokens, 1),
        threadgroup=(SIMD_WIDTH, 1, 1),
        output_shapes=((tokens, top_k), (tokens, top_k)),
        output_dtypes=(mx.uint32, mx.float32),
    )
