"""Tests of the inventory of tensors: the published sizes of Kimi K2 Thinking, and the division into shards."""

import itertools
import math

import pytest

from mlx_k2.config import ModelConfig
from mlx_k2.testing.tiny_config import as_kimi_k25, tiny_config_fields
from mlx_k2.weights.inventory import (
    TensorSpec,
    embedding_read_bytes_per_token,
    embedding_specs,
    head_specs,
    held_bytes,
    layer_read_bytes_per_token,
    layer_specs,
    model_specs,
    shard_specs,
)
from mlx_k2.weights.known_layout import thinking_config_fields
from tests.weights.tiny_checkpoints import config_of


@pytest.fixture(scope="module")
def thinking() -> ModelConfig:
    return config_of(thinking_config_fields())


@pytest.fixture(scope="module")
def thinking_specs(thinking: ModelConfig) -> tuple[TensorSpec, ...]:
    return model_specs(thinking)


def test_kimi_k2_thinking_has_its_published_size(thinking_specs: tuple[TensorSpec, ...]) -> None:
    assert held_bytes(thinking_specs) == 594_205_351_936
    not_held = [spec for spec in thinking_specs if spec.held_bytes(2) == 0]
    assert len(not_held) == 60 * 384 * 3  # the weight_shape of each matrix of each routed expert
    assert sum(spec.num_bytes for spec in not_held) == 8 * len(not_held)


def test_kimi_k2_thinking_has_its_published_number_of_parameters(thinking_specs: tuple[TensorSpec, ...]) -> None:
    num_parameters = 0
    for spec in thinking_specs:
        if not spec.name.endswith(("weight_scale", "weight_shape")):
            per_value = 8 if spec.name.endswith("weight_packed") else 1
            num_parameters += math.prod(spec.shape) * per_value
    assert num_parameters == 1_026_408_232_448


def test_kimi_k25_has_its_published_number_of_tensors_less_the_tensors_for_images() -> None:
    specs = model_specs(config_of(as_kimi_k25(thinking_config_fields())))
    num_published, num_vision_tensors = 208_550, 335
    assert len(specs) == num_published - num_vision_tensors
    assert all(spec.name.startswith("language_model.") for spec in specs)


def test_layers_embedding_and_head_of_kimi_k2_thinking_have_their_published_sizes(thinking: ModelConfig) -> None:
    assert held_bytes(layer_specs(thinking, 0)) == 995_000_320
    assert {held_bytes(layer_specs(thinking, layer)) for layer in range(1, 61)} == {9_808_545_280}
    assert held_bytes(embedding_specs(thinking)) + held_bytes(head_specs(thinking)) == 4_697_634_816


def test_a_token_of_kimi_k2_thinking_reads_33_gigabytes(thinking: ModelConfig) -> None:
    embedding_bytes = embedding_read_bytes_per_token(thinking)
    layer_bytes = sum(layer_read_bytes_per_token(thinking, layer) for layer in range(61))
    assert embedding_bytes == 7168 * 2
    assert embedding_bytes + layer_bytes + held_bytes(head_specs(thinking)) == 32_986_519_552


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dense_bits", "gigabytes_read", "gigabytes_held"), [(None, 32.99, 594.21), (8, 23.25, 584.47), (4, 18.06, 579.28)]
)
def test_dense_bits_do_not_change_routed_experts_router_norms_or_embedding(
    thinking: ModelConfig, dense_bits: int | None, gigabytes_read: float, gigabytes_held: float
) -> None:
    layer_bytes = sum(layer_read_bytes_per_token(thinking, layer, dense_bits=dense_bits) for layer in range(61))
    head_bytes = held_bytes(head_specs(thinking), dense_bits=dense_bits)
    read_bytes = embedding_read_bytes_per_token(thinking) + layer_bytes + head_bytes
    assert round(read_bytes / 1e9, 2) == gigabytes_read
    specs = model_specs(thinking)
    assert round(held_bytes(specs, dense_bits=dense_bits) / 1e9, 2) == gigabytes_held
    quantized = [spec for spec in specs if spec.held_bytes(2, dense_bits) != spec.held_bytes(2)]
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    dense = {"gate_proj", "up_proj", "down_proj", "lm_head"} | attention
    assert {spec.name.split(".")[-2] for spec in quantized} == (dense if dense_bits else set())
    assert not any(spec.is_routed_expert for spec in quantized)


def test_in_float32_dense_weights_double_and_routed_experts_use_6_bits_per_weight(thinking: ModelConfig) -> None:
    specs = layer_specs(thinking, 1)
    routed = [spec for spec in specs if spec.is_routed_expert]
    others = [spec for spec in specs if not spec.is_routed_expert]
    assert held_bytes(routed) == 384 * 3 * 7168 * 2048 * 4.5 / 8
    assert held_bytes(routed, 4) * 4.5 == held_bytes(routed) * 6
    bias_bytes = 384 * 4  # e_score_correction_bias is always in float32
    assert held_bytes(others, 4) - bias_bytes == 2 * (held_bytes(others) - bias_bytes)


def test_tensor_names_and_shapes_equal_the_original_files(thinking_specs: tuple[TensorSpec, ...]) -> None:
    by_name = {spec.name: spec for spec in thinking_specs}
    expert = "model.layers.60.mlp.experts.383"
    for name, dtype, shape in (
        ("model.layers.0.mlp.down_proj.weight", "BF16", (7168, 18432)),
        ("model.layers.1.mlp.gate.e_score_correction_bias", "F32", (384,)),
        ("model.layers.1.mlp.shared_experts.down_proj.weight", "BF16", (7168, 2048)),
        ("model.layers.30.self_attn.q_b_proj.weight", "BF16", (12288, 1536)),
        ("model.layers.30.self_attn.kv_a_proj_with_mqa.weight", "BF16", (576, 7168)),
        ("model.layers.30.self_attn.kv_b_proj.weight", "BF16", (16384, 512)),
        (f"{expert}.up_proj.weight_packed", "I32", (2048, 896)),
        (f"{expert}.down_proj.weight_scale", "BF16", (7168, 64)),
        (f"{expert}.down_proj.weight_shape", "I32", (2,)),
        ("lm_head.weight", "BF16", (163840, 7168)),
    ):
        assert (by_name[name].dtype, by_name[name].shape) == (dtype, shape)


def test_only_weight_shape_may_also_be_int64() -> None:
    spec = TensorSpec("model.layers.1.mlp.experts.0.up_proj.weight_shape", "I32", (2,))
    assert spec.accepted_dtypes == ("I32", "I64")
    assert TensorSpec("model.norm.weight", "BF16", (8,)).accepted_dtypes == ("BF16",)


@pytest.mark.parametrize("num_shards", range(1, 8))
def test_each_tensor_is_in_exactly_one_shard(num_shards: int) -> None:
    config = config_of(tiny_config_fields(vocab_size=256))
    cuts = [config.num_hidden_layers * shard // num_shards for shard in range(num_shards + 1)]
    shards = [shard_specs(config, first, end) for first, end in itertools.pairwise(cuts)]
    names = [spec.name for shard in shards for spec in shard]
    assert sorted(names) == sorted(spec.name for spec in model_specs(config))
    assert len(set(names)) == len(names)
    assert [shard for shard in range(num_shards) if embedding_specs(config)[0] in shards[shard]] == [0]
    assert [shard for shard in range(num_shards) if head_specs(config)[1] in shards[shard]] == [num_shards - 1]


def test_without_q_lora_rank_there_is_one_query_projection() -> None:
    names = [spec.name for spec in layer_specs(config_of(tiny_config_fields(vocab_size=256, q_lora_rank=None)), 1)]
    assert "model.layers.1.self_attn.q_proj.weight" in names
    assert not [name for name in names if ".q_a_" in name or ".q_b_" in name]
