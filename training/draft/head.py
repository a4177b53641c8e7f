"""The draft head in MLX, for training: EAGLE-3 with multi-head latent attention, computed in the naive way.

Position t reads the hidden states of t and the token of t + 1, and predicts the token of t + 2. An unrolled step after
the first reads at position t, in place of the hidden states, the previous step's output at t - 1. Knows no data.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
from mlx import nn

from mlx_k2.config import ModelConfig
from mlx_k2.model.rope import Rotate, make_rope

Weights = dict[str, mx.array]
_LAYER = "layers.0"


@dataclass(frozen=True)
class Batch:
    """Answers, padded on the right. ``queries`` are the positions whose prediction counts; the rest only are context.

    aux (rows, positions, aux width); next_ids (rows, positions): the token after each position; queries (rows, count);
    is_real (rows, count): False for padding of the queries; target (rows, count, hidden): the model's normed output
    that predicts the same token.
    """

    aux: mx.array
    next_ids: mx.array
    queries: mx.array
    is_real: mx.array
    target: mx.array


def initial_weights(config: ModelConfig, num_aux: int, intermediate: int, aux_scale: float, key: mx.array) -> Weights:
    """Return random weights by their public names. ``aux_scale`` is the standard deviation of the hidden states."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    q_rank = config.q_lora_rank
    assert q_rank is not None
    key_up = config.qk_nope_head_dim + config.v_head_dim
    attention, mlp = f"{_LAYER}.self_attn", f"{_LAYER}.mlp"
    shapes = {  # rows, columns, gain
        "fc.weight": (hidden, num_aux * hidden, 1 / aux_scale),
        f"{attention}.q_a_proj.weight": (q_rank, 2 * hidden, 1.0),
        f"{attention}.q_b_proj.weight": (heads * config.qk_head_dim, q_rank, 1.0),
        f"{attention}.kv_a_proj_with_mqa.weight": (config.cache_row_dim, 2 * hidden, 1.0),
        f"{attention}.kv_b_proj.weight": (heads * key_up, config.kv_lora_rank, 1.0),
        f"{attention}.o_proj.weight": (hidden, heads * config.v_head_dim, 0.3),
        f"{mlp}.gate_proj.weight": (intermediate, hidden, 1.0),
        f"{mlp}.up_proj.weight": (intermediate, hidden, 1.0),
        f"{mlp}.down_proj.weight": (hidden, intermediate, 0.3),
    }
    norms = {
        f"{_LAYER}.input_layernorm.weight": hidden,
        f"{_LAYER}.hidden_norm.weight": hidden,
        f"{_LAYER}.post_attention_layernorm.weight": hidden,
        f"{attention}.q_a_layernorm.weight": q_rank,
        f"{attention}.kv_a_layernorm.weight": config.kv_lora_rank,
        "norm.weight": hidden,
    }
    keys = mx.random.split(key, len(shapes))
    matrices = {
        name: mx.random.normal((rows, columns), key=one) * (gain / math.sqrt(columns))
        for (name, (rows, columns, gain)), one in zip(shapes.items(), keys, strict=True)
    }
    return matrices | {name: mx.ones((size,)) for name, size in norms.items()}


class HeadForward:
    """The head's computation for the built-in model's sizes, with the model's own embedding and output projection."""

    def __init__(self, config: ModelConfig, embedding: mx.array, head: mx.array) -> None:
        self._config = config
        self._embedding = embedding
        self._head = head.T
        self._rotate = make_rope(config)

    def logits(self, weights: Weights, batch: Batch, num_steps: int) -> list[mx.array]:
        """Return the logits (rows, count, vocabulary) of each unrolled step."""
        layer = _Layer(self._config, weights, self._rotate)
        hidden = batch.aux @ weights["fc.weight"].T
        embedded = self._embedding[batch.next_ids]
        positions = mx.broadcast_to(mx.arange(hidden.shape[1]), hidden.shape[:2])
        where = batch.queries[..., None]
        query_embedded = mx.take_along_axis(embedded, where, axis=1)
        residual = mx.take_along_axis(hidden, where, axis=1)
        joined = layer.join(embedded, hidden)
        context = layer.keys_values(joined, positions)
        own: list[tuple[mx.array, mx.array]] = []
        outputs = []
        for step in range(num_steps):
            mixed = layer.join(query_embedded, residual)
            if step:
                own.append(layer.keys_values(mixed, batch.queries))
            output = layer.run(mixed, residual, batch.queries, context, own)
            outputs.append(self.predict(weights, output))
            residual = _later(output, 1)
        return outputs

    def predict(self, weights: Weights, output: mx.array) -> mx.array:
        """Return the logits of the head's output."""
        return mx.fast.rms_norm(output, weights["norm.weight"], self._config.rms_norm_eps) @ self._head

    def target_logits(self, normed: mx.array) -> mx.array:
        """Return the model's logits of its last layer's normed output."""
        return normed @ self._head


class _Layer:
    """The head's one decoder layer."""

    def __init__(self, config: ModelConfig, weights: Weights, rotate: Rotate) -> None:
        self._config = config
        self._weights = weights
        self._rotate_flat = rotate
        self._eps = config.rms_norm_eps

    def join(self, embedded: mx.array, hidden: mx.array) -> mx.array:
        """Return the input of attention: normed embedding and normed hidden states side by side."""
        return mx.concatenate([self._norm(embedded, "input_layernorm"), self._norm(hidden, "hidden_norm")], axis=-1)

    def keys_values(self, joined: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
        """Return keys (rows, heads, count, qk_head) and values (rows, heads, count, v_head)."""
        config = self._config
        compressed = self._project(joined, "self_attn.kv_a_proj_with_mqa")
        latent = self._norm(compressed[..., : config.kv_lora_rank], "self_attn.kv_a_layernorm")
        rotated = self._rotate(compressed[..., None, config.kv_lora_rank :], positions)  # (rows, count, 1, rope)
        both = self._project(latent, "self_attn.kv_b_proj")
        both = both.reshape(*both.shape[:2], config.num_attention_heads, -1)
        keys, values = both[..., : config.qk_nope_head_dim], both[..., config.qk_nope_head_dim :]
        shared = mx.broadcast_to(rotated, (*keys.shape[:3], config.qk_rope_head_dim))
        return mx.concatenate([keys, shared], axis=-1).swapaxes(1, 2), values.swapaxes(1, 2)

    def run(
        self,
        joined: mx.array,
        residual: mx.array,
        positions: mx.array,
        context: tuple[mx.array, mx.array],
        own: list[tuple[mx.array, mx.array]],
    ) -> mx.array:
        """Return the layer's output (rows, count, hidden) for the queries at ``positions``.

        In step k, counted from 0, ``own`` has the keys and values of steps 1 to k. A query sees the context up to k
        positions before it, and then one position of each of these steps.
        """
        config = self._config
        queries = self._project(
            self._norm(self._project(joined, "self_attn.q_a_proj"), "self_attn.q_a_layernorm"), "self_attn.q_b_proj"
        )
        queries = queries.reshape(*queries.shape[:2], config.num_attention_heads, -1) * config.softmax_scale
        rotated = self._rotate(queries[..., config.qk_nope_head_dim :], positions)
        queries = mx.concatenate([queries[..., : config.qk_nope_head_dim], rotated], axis=-1).swapaxes(1, 2)
        keys, values = context
        is_seen = mx.arange(keys.shape[2]) <= (positions - len(own))[..., None]  # (rows, count, positions)
        scores = mx.where(is_seen[:, None], queries @ keys.swapaxes(-1, -2), -1e9)
        shifts = [len(own) - 1 - index for index in range(len(own))]
        diagonal = [
            mx.sum(queries * _later(one, shift, axis=2), axis=-1, keepdims=True)
            for (one, _), shift in zip(own, shifts, strict=True)
        ]
        chances = mx.softmax(mx.concatenate([scores, *diagonal], axis=-1), axis=-1)
        mixed = chances[..., : keys.shape[2]] @ values
        for index, ((_, one), shift) in enumerate(zip(own, shifts, strict=True)):
            column = keys.shape[2] + index
            mixed = mixed + chances[..., column : column + 1] * _later(one, shift, axis=2)
        mixed = mixed.swapaxes(1, 2).flatten(2)
        after = residual + self._project(mixed, "self_attn.o_proj")
        normed = self._norm(after, "post_attention_layernorm")
        inner = nn.silu(self._project(normed, "mlp.gate_proj")) * self._project(normed, "mlp.up_proj")
        return after + self._project(inner, "mlp.down_proj")

    def _project(self, x: mx.array, name: str) -> mx.array:
        return x @ self._weights[f"{_LAYER}.{name}.weight"].T

    def _norm(self, x: mx.array, name: str) -> mx.array:
        return mx.fast.rms_norm(x, self._weights[f"{_LAYER}.{name}.weight"], self._eps)

    def _rotate(self, x: mx.array, positions: mx.array) -> mx.array:
        return self._rotate_flat(x.flatten(0, 1), positions.flatten()).reshape(x.shape)


def _later(x: mx.array, count: int, axis: int = 1) -> mx.array:
    """Return ``x`` moved ``count`` places towards the end along ``axis``, with zeros in front."""
    if count == 0:
        return x
    kept = x[:, :-count] if axis == 1 else x[:, :, :-count]
    widths = [(0, 0)] * x.ndim
    widths[axis] = (count, 0)
    return mx.pad(kept, widths)
