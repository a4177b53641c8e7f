"""The computation of a decoder layer: attention, then a dense SwiGLU block or routed experts plus a shared expert.

The parts before and after attention are compiled for small batches. Attention itself is not compiled, because its
graph depends on the length of each sequence.
"""

from collections.abc import Callable

import mlx.core as mx

from mlx_k2.config import ModelConfig
from mlx_k2.kernels.experts import route, routed_experts
from mlx_k2.kernels.reference import RouterRule
from mlx_k2.model.attention import (
    ON_CPU,
    AttentionLimits,
    Projections,
    attend_absorbed,
    attend_naive,
    make_projections,
)
from mlx_k2.model.batch import Batch
from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.model.layer_weights import AttentionWeights, DenseWeights, LayerWeights, MoeWeights
from mlx_k2.model.linear import multiply
from mlx_k2.model.rope import make_rope

FeedForward = Callable[[mx.array, DenseWeights | MoeWeights], mx.array]

COMPILED_TOKENS = 16
"""Largest batch that runs compiled. MLX compiles each batch size once and keeps the result. Compiling helps small
batches only: for them, building the graph takes longer than running it."""


class DecoderLayer:
    """The computation that all decoder layers of a stage share. Each call receives the weights of one layer."""

    def __init__(self, config: ModelConfig, attention_limits: AttentionLimits = ON_CPU) -> None:
        self._eps = config.rms_norm_eps
        self._kv_lora_rank = config.kv_lora_rank
        self._attention_limits = attention_limits
        self._project = make_projections(config, make_rope(config))
        self._feed_forward = make_feed_forward(config)
        self._compiled_before, self._compiled_after = mx.compile(self._before), mx.compile(self._after)

    def run(self, hidden: mx.array, index: int, weights: LayerWeights, batch: Batch, cache: LatentCache) -> mx.array:
        """Return the layer's output for ``hidden``, both (tokens, hidden). Write to layer ``index`` of the cache."""
        is_small = batch.num_tokens <= COMPILED_TOKENS
        before, after = (self._compiled_before, self._compiled_after) if is_small else (self._before, self._after)
        projections = before(hidden, batch.positions, batch.num_generated, weights.input_norm, weights.attention)
        latents, values = self._attend(projections, index, weights.attention, batch, cache)
        return after(hidden, latents, values, weights)

    def _before(
        self, hidden: mx.array, positions: mx.array, num_generated: int, norm: mx.array, weights: AttentionWeights
    ) -> Projections:
        return self._project(mx.fast.rms_norm(hidden, norm, self._eps), positions, num_generated, weights)

    def _after(
        self, hidden: mx.array, latents: mx.array | None, values: mx.array | None, weights: LayerWeights
    ) -> mx.array:
        attended = join_heads(latents, values, weights.attention)
        hidden = hidden + multiply(attended, weights.attention.output)
        normed = mx.fast.rms_norm(hidden, weights.post_attention_norm, self._eps)
        return hidden + self._feed_forward(normed, weights.feed_forward)

    def _attend(
        self, projections: Projections, index: int, weights: AttentionWeights, batch: Batch, cache: LatentCache
    ) -> tuple[mx.array | None, mx.array | None]:
        """Return latents (heads, generated tokens, kv_lora_rank) and values (heads, prompt tokens, v_head)."""
        absorbed, naive = [], []
        start = 0
        for span in batch.spans:
            end = start + span.count
            keys = cache.write(index, span, projections.cache_rows[start:end])
            if span.is_prompt:
                assert projections.naive_queries is not None, "the batch has prompt tokens"
                queries = projections.naive_queries[:, start - batch.num_generated : end - batch.num_generated]
                naive.append(attend_naive(queries, keys, span.position, weights, self._attention_limits))
            else:
                assert projections.absorbed_queries is not None, "the batch has generated tokens"
                queries = projections.absorbed_queries[:, start:end]
                absorbed.append(
                    attend_absorbed(queries, keys, span.position, self._kv_lora_rank, self._attention_limits)
                )
            start = end
        return _join_spans(absorbed), _join_spans(naive)


def make_feed_forward(config: ModelConfig) -> FeedForward:
    """Return the function (hidden (tokens, hidden), weights) -> (tokens, hidden) of dense layers and of experts."""
    rule = RouterRule(
        config.num_experts_per_tok,
        config.norm_topk_prob,
        config.routed_scaling_factor,
        num_groups=config.n_group,
        top_groups=config.topk_group,
    )

    def feed_forward(hidden: mx.array, weights: DenseWeights | MoeWeights) -> mx.array:
        if isinstance(weights, DenseWeights):
            return swiglu(hidden, weights)
        expert_ids, expert_weights = route(hidden, weights.router, weights.correction_bias, rule)
        output = routed_experts(hidden, expert_ids, expert_weights, weights.experts)
        return output if weights.shared is None else output + swiglu(hidden, weights.shared)

    return feed_forward


def swiglu(hidden: mx.array, weights: DenseWeights) -> mx.array:
    """Return down(silu(gate(x)) * up(x)): (tokens, hidden) -> (tokens, hidden)."""
    gate = multiply(hidden, weights.gate)
    return multiply(gate * mx.sigmoid(gate) * multiply(hidden, weights.up), weights.down)


def _join_spans(span_outputs: list[mx.array]) -> mx.array | None:
    """Return the outputs (heads, count, width) of all spans in one array (heads, tokens, width); None without spans."""
    if len(span_outputs) > 1:
        return mx.concatenate(span_outputs, axis=1)
    return span_outputs[0] if span_outputs else None


def join_heads(latents: mx.array | None, values: mx.array | None, weights: AttentionWeights) -> mx.array:
    """Return attention's output (tokens, heads * v_head) for all tokens, the generated ones first.

    ``latents`` is the output of absorbed attention, ``values`` that of naive attention (`DecoderLayer._attend`).
    """
    head_outputs = [] if latents is None else [multiply(latents, weights.value_up)]
    if values is not None:
        head_outputs.append(values)
    joined = _join_spans(head_outputs)
    assert joined is not None, "a step without tokens"
    return joined.swapaxes(0, 1).flatten(1)
