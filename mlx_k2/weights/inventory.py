"""The tensors that a model's checkpoint must hold, and their sizes, computed from its config. Opens no file.

Names, dtypes and shapes are those of the original Kimi K2 checkpoints: routed experts are packed INT4 in groups of 32,
with bfloat16 scales and int32 shapes; the router's correction bias is float32, all else is bfloat16. The matrices of
attention, shared experts, dense layers and the head may be quantized by mx.quantize while they are loaded, to
``dense_bits`` bits per weight (None: they are not quantized). ``compute_bytes`` is the size of a value in the compute
dtype.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from mlx_k2.config import ModelConfig

INT4_GROUP_SIZE = 32
INT4_PER_WORD = 8
BFLOAT16_BYTES = 2  # bfloat16 is the only compute dtype of this size
DENSE_GROUP_SIZES = (64, 32)
"""The first size that divides a matrix's inputs is used; a matrix that none divides is not quantized."""

_ITEM_BYTES = {"BF16": 2, "F32": 4, "I32": 4, "I64": 8}
_ROUTED_EXPERTS = ".mlp.experts."
_WEIGHT_SHAPE = ".weight_shape"
_WEIGHT_SCALE = ".weight_scale"


class DenseMatrix(NamedTuple):
    """The shape of a matrix that is multiplied with the values of each token."""

    outputs: int
    inputs: int

    def held_bytes(self, compute_bytes: int, bits: int | None) -> int:
        """Return the bytes in memory. A quantized matrix has ``bits`` per weight, and a scale and a bias per group."""
        num_weights = self.outputs * self.inputs
        group = group_size(self.inputs)
        if bits is None or group is None:
            return num_weights * compute_bytes
        return num_weights * bits // 8 + num_weights // group * 2 * compute_bytes


def group_size(inputs: int) -> int | None:
    """Return how many inputs of a dense matrix share a scale and a bias; None if they cannot be grouped."""
    return next((size for size in DENSE_GROUP_SIZES if inputs % size == 0), None)


class TensorSpec(msgspec.Struct, frozen=True):
    """One tensor as the checkpoint must hold it; ``dtype`` is safetensors' name of the dtype.

    ``matrices`` are the matrices of a tensor that may be quantized: the tensor itself, the two halves of kv_b_proj, or
    the slices of a draft head's ``fc``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    matrices: tuple[DenseMatrix, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    @property
    def accepted_dtypes(self) -> tuple[str, ...]:
        """Dtypes that the tensor may have in the file: compressed-tensors writes ``weight_shape`` as int64."""
        return ("I32", "I64") if self.name.endswith(_WEIGHT_SHAPE) else (self.dtype,)

    def held_bytes(self, compute_bytes: int, dense_bits: int | None = None) -> int:
        """Return the tensor's bytes in memory.

        Routed experts and the correction bias stay as stored. Exception: if the compute dtype is not bfloat16, scales
        are converted to it, and a bias is added for each. ``weight_shape`` is not held: the config has its values.
        """
        if self.name.endswith(_WEIGHT_SHAPE):
            return 0
        if self.name.endswith(_WEIGHT_SCALE) and compute_bytes != BFLOAT16_BYTES:
            return 2 * math.prod(self.shape) * compute_bytes
        if self.matrices:
            return sum(matrix.held_bytes(compute_bytes, dense_bits) for matrix in self.matrices)
        is_kept = self.is_routed_expert or self.dtype != "BF16"
        return self.num_bytes if is_kept else math.prod(self.shape) * compute_bytes

    @property
    def is_routed_expert(self) -> bool:
        """True if the tensor belongs to a routed expert."""
        return _ROUTED_EXPERTS in self.name


def embedding_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Return the spec of the embedding table in a tuple."""
    return (bf16_spec(f"{config.tensor_prefix}model.embed_tokens.weight", config.vocab_size, config.hidden_size),)


def head_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Return the specs of the last norm and the output projection, which the last stage holds."""
    prefix = config.tensor_prefix
    return (
        bf16_spec(f"{prefix}model.norm.weight", config.hidden_size),
        linear_spec(f"{prefix}lm_head.weight", config.vocab_size, config.hidden_size),
    )


def layer_specs(config: ModelConfig, layer: int) -> tuple[TensorSpec, ...]:
    """Return the specs of every tensor of one decoder layer."""
    assert 0 <= layer < config.num_hidden_layers, f"layer {layer} of {config.num_hidden_layers}"
    prefix = f"{config.tensor_prefix}model.layers.{layer}"
    norms = tuple(
        bf16_spec(f"{prefix}.{name}.weight", config.hidden_size)
        for name in ("input_layernorm", "post_attention_layernorm")
    )
    attention = attention_specs(config, f"{prefix}.self_attn", config.hidden_size)
    if config.is_moe(layer):
        return norms + attention + _moe_specs(config, f"{prefix}.mlp")
    return norms + attention + mlp_specs(f"{prefix}.mlp", config.hidden_size, config.intermediate_size)


def shard_specs(config: ModelConfig, first_layer: int, end_layer: int) -> tuple[TensorSpec, ...]:
    """Return the specs of the stage with the layers ``first_layer`` to ``end_layer`` - 1.

    The embedding belongs to the first layer's stage, last norm and output projection to the last layer's.
    """
    assert 0 <= first_layer < end_layer <= config.num_hidden_layers, f"layers {first_layer} to {end_layer}"
    specs = list(embedding_specs(config)) if first_layer == 0 else []
    for layer in range(first_layer, end_layer):
        specs += layer_specs(config, layer)
    if end_layer == config.num_hidden_layers:
        specs += head_specs(config)
    return tuple(specs)


def model_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Return the specs of every tensor of the model."""
    return shard_specs(config, 0, config.num_hidden_layers)


def held_bytes(specs: Iterable[TensorSpec], compute_bytes: int = BFLOAT16_BYTES, dense_bits: int | None = None) -> int:
    """Return the bytes that stay in memory once ``specs`` are loaded."""
    return sum(spec.held_bytes(compute_bytes, dense_bits) for spec in specs)


def layer_read_bytes_per_token(
    config: ModelConfig, layer: int, compute_bytes: int = BFLOAT16_BYTES, dense_bits: int | None = None
) -> int:
    """Return the bytes of weights that are read in ``layer`` to decode one token: of routed experts only the chosen."""
    specs = layer_specs(config, layer)
    all_experts = held_bytes((spec for spec in specs if spec.is_routed_expert), compute_bytes)
    other_weights = held_bytes((spec for spec in specs if not spec.is_routed_expert), compute_bytes, dense_bits)
    return other_weights + all_experts * config.num_experts_per_tok // config.n_routed_experts


def embedding_read_bytes_per_token(config: ModelConfig, compute_bytes: int = BFLOAT16_BYTES) -> int:
    """Return the bytes of one token's row of the embedding."""
    return held_bytes(embedding_specs(config), compute_bytes) // config.vocab_size


def bf16_spec(name: str, *shape: int) -> TensorSpec:
    """Return the spec of a bfloat16 tensor that is never quantized while loading."""
    return TensorSpec(name, "BF16", shape)


def linear_spec(name: str, outputs: int, inputs: int) -> TensorSpec:
    """Return the spec of a bfloat16 matrix that may be quantized while loading."""
    return TensorSpec(name, "BF16", (outputs, inputs), (DenseMatrix(outputs, inputs),))


def _kv_b_proj_spec(config: ModelConfig, name: str) -> TensorSpec:
    """Return the spec of kv_b_proj, whose halves map latents to each head's keys and to its values.

    The first half is held transposed, because queries are multiplied with it.
    """
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    halves = (
        DenseMatrix(heads * latent, config.qk_nope_head_dim),
        DenseMatrix(heads * config.v_head_dim, latent),
    )
    return TensorSpec(name, "BF16", (heads * (config.qk_nope_head_dim + config.v_head_dim), latent), halves)


def attention_specs(config: ModelConfig, prefix: str, inputs: int) -> tuple[TensorSpec, ...]:
    """Return the specs of a layer's attention, whose first projections have ``inputs`` inputs."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    query_dim = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        query: tuple[TensorSpec, ...] = (linear_spec(f"{prefix}.q_proj.weight", query_dim, inputs),)
    else:
        query = (
            linear_spec(f"{prefix}.q_a_proj.weight", config.q_lora_rank, inputs),
            bf16_spec(f"{prefix}.q_a_layernorm.weight", config.q_lora_rank),
            linear_spec(f"{prefix}.q_b_proj.weight", query_dim, config.q_lora_rank),
        )
    return (
        *query,
        linear_spec(f"{prefix}.kv_a_proj_with_mqa.weight", config.cache_row_dim, inputs),
        bf16_spec(f"{prefix}.kv_a_layernorm.weight", config.kv_lora_rank),
        _kv_b_proj_spec(config, f"{prefix}.kv_b_proj.weight"),
        linear_spec(f"{prefix}.o_proj.weight", hidden, heads * config.v_head_dim),
    )


def mlp_specs(prefix: str, hidden: int, intermediate: int) -> tuple[TensorSpec, ...]:
    """Return the specs of a SwiGLU block."""
    return (
        linear_spec(f"{prefix}.gate_proj.weight", intermediate, hidden),
        linear_spec(f"{prefix}.up_proj.weight", intermediate, hidden),
        linear_spec(f"{prefix}.down_proj.weight", hidden, intermediate),
    )


def _moe_specs(config: ModelConfig, prefix: str) -> tuple[TensorSpec, ...]:
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    specs = [
        bf16_spec(f"{prefix}.gate.weight", config.n_routed_experts, hidden),
        TensorSpec(f"{prefix}.gate.e_score_correction_bias", "F32", (config.n_routed_experts,)),
    ]
    if config.n_shared_experts:
        specs += mlp_specs(f"{prefix}.shared_experts", hidden, intermediate * config.n_shared_experts)
    for expert in range(config.n_routed_experts):
        specs += _packed_specs(f"{prefix}.experts.{expert}.gate_proj", intermediate, hidden)
        specs += _packed_specs(f"{prefix}.experts.{expert}.up_proj", intermediate, hidden)
        specs += _packed_specs(f"{prefix}.experts.{expert}.down_proj", hidden, intermediate)
    return tuple(specs)


def _packed_specs(prefix: str, rows: int, columns: int) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(f"{prefix}.weight_packed", "I32", (rows, columns // INT4_PER_WORD)),
        bf16_spec(f"{prefix}.weight_scale", rows, columns // INT4_GROUP_SIZE),
        TensorSpec(f"{prefix}{_WEIGHT_SHAPE}", "I32", (2,)),
    )
