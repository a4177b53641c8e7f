"""The weights of one decoder layer as the layer computes with them, built from a checkpoint's tensors by name.

Matrices are (in, out), to be multiplied from the right, and quantized if dense bits are given (linear.py). Transposed
views are created here once, not in each step. The router and the routed experts stay (out, in), as kernels read them,
and are not quantized here.
"""

from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx

from mlx_k2.config import ModelConfig
from mlx_k2.kernels.stack import AffineStack, ExpertStack, make_affine
from mlx_k2.model.linear import Matrix, make_matrix


class LowRankQuery(NamedTuple):
    """Weights of the query projection: two matrices with a normed bottleneck between them."""

    down: Matrix  # (hidden, q_lora_rank)
    norm: mx.array  # (q_lora_rank,)
    up: Matrix  # (q_lora_rank, heads * qk_head)


class AttentionWeights(NamedTuple):
    """Weights of multi-head latent attention. kv_b_proj is split into ``key_up`` and ``value_up``, by head."""

    query: Matrix | LowRankQuery  # a matrix (hidden, heads * qk_head) if the config's q_lora_rank is null
    latent_down: Matrix  # (hidden, kv_lora_rank + qk_rope): to the latent, and to the part of the key that is rotated
    latent_norm: mx.array  # (kv_lora_rank,)
    key_up: Matrix  # (heads, qk_nope, kv_lora_rank)
    value_up: Matrix  # (heads, kv_lora_rank, v_head)
    output: Matrix  # (heads * v_head, hidden)


class DenseWeights(NamedTuple):
    """Weights of a SwiGLU block: of a dense layer or of a shared expert."""

    gate: Matrix  # (hidden, intermediate)
    up: Matrix  # (hidden, intermediate)
    down: Matrix  # (intermediate, hidden)


class MoeWeights(NamedTuple):
    """Weights of the router, the routed experts, and the shared expert that every token uses."""

    router: mx.array  # (experts, hidden)
    correction_bias: mx.array  # (experts,) float32
    experts: ExpertStack | AffineStack  # AffineStack if the model computes in float32
    shared: DenseWeights | None  # None: the model has no shared expert


class LayerWeights(NamedTuple):
    """Weights of one decoder layer."""

    input_norm: mx.array  # (hidden,)
    attention: AttentionWeights
    post_attention_norm: mx.array  # (hidden,)
    feed_forward: DenseWeights | MoeWeights


def assemble_layer(
    config: ModelConfig, layer: int, tensors: Mapping[str, mx.array], dense_bits: int | None = None
) -> LayerWeights:
    """Return one layer's weights from tensors named as in the checkpoint, without ``model.layers.N.``.

    The routed experts must be stacked: ``mlp.experts.gate_proj.weight_packed`` is (experts, rows, words), and so on.
    """
    is_moe = config.is_moe(layer)
    return LayerWeights(
        input_norm=tensors["input_layernorm.weight"],
        attention=assemble_attention(config, tensors, dense_bits),
        post_attention_norm=tensors["post_attention_layernorm.weight"],
        feed_forward=_assemble_moe(config, tensors, dense_bits)
        if is_moe
        else assemble_dense(tensors, "mlp", dense_bits),
    )


def assemble_attention(config: ModelConfig, tensors: Mapping[str, mx.array], bits: int | None) -> AttentionWeights:
    """Return a layer's attention weights from the tensors whose names begin with ``self_attn.``."""

    def matrix(name: str) -> Matrix:
        return make_matrix(tensors[f"self_attn.{name}.weight"], bits)

    query: Matrix | LowRankQuery
    if config.q_lora_rank is None:
        query = matrix("q_proj")
    else:
        query = LowRankQuery(matrix("q_a_proj"), tensors["self_attn.q_a_layernorm.weight"], matrix("q_b_proj"))
    per_head = tensors["self_attn.kv_b_proj.weight"].reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    keys, values = per_head[:, : config.qk_nope_head_dim], per_head[:, config.qk_nope_head_dim :]
    return AttentionWeights(
        query=query,
        latent_down=matrix("kv_a_proj_with_mqa"),
        latent_norm=tensors["self_attn.kv_a_layernorm.weight"],
        key_up=make_matrix(mx.contiguous(keys).swapaxes(-1, -2), bits),
        value_up=make_matrix(mx.contiguous(values), bits),
        output=matrix("o_proj"),
    )


def assemble_dense(tensors: Mapping[str, mx.array], prefix: str, bits: int | None) -> DenseWeights:
    """Return the weights of a SwiGLU block from the tensors whose names begin with ``prefix``."""
    names = (f"{prefix}.{name}_proj.weight" for name in ("gate", "up", "down"))
    return DenseWeights(*(make_matrix(tensors[name], bits) for name in names))


def _assemble_moe(config: ModelConfig, tensors: Mapping[str, mx.array], bits: int | None) -> MoeWeights:
    experts = ExpertStack(
        *(
            tensors[f"mlp.experts.{name}_proj.{part}"]
            for name in ("gate", "up", "down")
            for part in ("weight_packed", "weight_scale")
        )
    )
    router = tensors["mlp.gate.weight"]
    return MoeWeights(
        router=router,
        correction_bias=tensors["mlp.gate.e_score_correction_bias"],
        experts=experts if experts.gate_scale.dtype == router.dtype else make_affine(experts, router.dtype),
        shared=assemble_dense(tensors, "mlp.shared_experts", bits) if config.n_shared_experts else None,
    )
