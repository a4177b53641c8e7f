"""Tests of reading config.json: a config is read completely, or refused with the name of the field."""

import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.config import Family, ModelConfig
from mlx_k2.errors import ConfigError
from mlx_k2.testing.tiny_config import as_kimi_k25, tiny_config_fields
from mlx_k2.weights.known_layout import thinking_config_fields

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def read_config(fields: Any) -> ModelConfig:
    return ModelConfig.from_json(json.dumps(fields).encode(), "config.json")


def quantization_with(**changes: Any) -> dict[str, Any]:
    """Return Kimi K2 Thinking's quantization_config with ``changes`` in the object "weights" of its group."""
    quantization: dict[str, Any] = thinking_config_fields()["quantization_config"]
    quantization["config_groups"]["group_0"]["weights"] |= changes
    return quantization


def test_kimi_k2_thinking_is_read() -> None:
    config = read_config(thinking_config_fields())
    assert config.family is Family.KIMI_K2
    assert config.tensor_prefix == ""
    assert (config.num_hidden_layers, config.n_routed_experts, config.q_lora_rank) == (61, 384, 1536)
    assert (config.qk_head_dim, config.cache_row_dim) == (192, 576)
    assert (config.rope.theta, config.rope.factor, config.rope.beta_fast) == (50000.0, 64.0, 1.0)
    assert config.eos_token_ids == (163586,)
    assert [layer for layer in range(61) if not config.is_moe(layer)] == [0]


def test_the_softmax_scale_includes_the_squared_yarn_temperature() -> None:
    # 192**-0.5 * (0.1 * ln(factor) + 1)**2, and a factor of at most 1 changes nothing; Thinking's factor is 64.
    assert read_config(thinking_config_fields()).softmax_scale == pytest.approx(0.14467963, abs=1e-8)
    rope = thinking_config_fields()["rope_scaling"]
    assert read_config(thinking_config_fields(rope_scaling=rope | {"factor": 32.0})).softmax_scale == pytest.approx(
        0.13086080, abs=1e-8
    )
    assert read_config(thinking_config_fields(rope_scaling=rope | {"factor": 1.0})).softmax_scale == pytest.approx(
        192**-0.5
    )


def test_kimi_k25_is_the_same_text_model_under_another_prefix() -> None:
    config = read_config(as_kimi_k25(thinking_config_fields()))
    assert config.family is Family.KIMI_K25
    assert config.tensor_prefix == "language_model."
    assert msgspec.structs.replace(config, family=Family.KIMI_K2) == read_config(thinking_config_fields())


def test_kimi_k25_may_keep_its_quantization_outside_the_text_config() -> None:
    fields = as_kimi_k25(thinking_config_fields())
    fields["quantization_config"] = fields["text_config"].pop("quantization_config")
    assert read_config(fields) == read_config(as_kimi_k25(thinking_config_fields()))


def test_both_spellings_of_the_rope_fields_are_read() -> None:
    fields = thinking_config_fields()
    scaling = fields.pop("rope_scaling")
    scaling["rope_type"] = scaling.pop("type")
    fields["rope_parameters"] = scaling | {"rope_theta": fields.pop("rope_theta")}
    assert read_config(fields) == read_config(thinking_config_fields())


@pytest.mark.parametrize(("eos", "token_ids"), [(None, ()), (3, (3,)), ([3, 4], (3, 4)), ([], ())])
def test_eos_token_id_may_be_null_one_token_or_a_list(eos: Any, token_ids: tuple[int, ...]) -> None:
    assert read_config(thinking_config_fields(eos_token_id=eos)).eos_token_ids == token_ids


def test_a_config_without_q_lora_rank_is_read() -> None:
    fields = tiny_config_fields(256)
    del fields["q_lora_rank"]
    assert read_config(fields).q_lora_rank is None
    assert read_config(tiny_config_fields(256, q_lora_rank=None)).q_lora_rank is None


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"\xff", b"null"])
def test_a_config_that_is_not_a_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is not a JSON object"):
        ModelConfig.from_json(data, "config.json")


@pytest.mark.parametrize(
    "name",
    # q_lora_rank is optional: a model without it has one query matrix.
    sorted((set(ModelConfig.__struct_fields__) & set(thinking_config_fields())) - {"q_lora_rank"}),
)
def test_a_missing_required_field_is_named(name: str) -> None:
    fields = thinking_config_fields()
    del fields[name]
    with pytest.raises(ConfigError, match=f"missing required field `{name}`"):
        read_config(fields)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not one that mlx-k2 runs"),
        ({"model_type": None}, "model_type None is not one"),
        ({"model_type": ["kimi_k2"]}, r"model_type \['kimi_k2'\] is not one"),
        ({"model_type": "kimi_k3"}, "Kimi K3 has another architecture.*fetch the original INT4 checkpoint"),
        ({"model_type": "kimi_k25"}, "needs a text_config object"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' is not implemented"),
        ({"topk_method": "greedy"}, "topk_method 'greedy' is not implemented"),
        ({"attention_bias": True}, "attention_bias True is not implemented"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True is not implemented"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers 1 is not implemented"),
        ({"hidden_size": "7168"}, r"hidden_size: expected a whole number, got text"),
        ({"hidden_size": 100}, ": hidden_size: expected a whole number that's a multiple of 32"),
        ({"moe_intermediate_size": 100}, "moe_intermediate_size: expected a whole number that's a multiple of 32"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim: expected a whole number that's a multiple of 2"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a whole number >= 1"),
        ({"vocab_size": -1}, "vocab_size: expected a whole number >= 1"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers of 384 experts are more than 100000"),
        ({"n_routed_experts": 3 * 10**9}, "n_routed_experts: expected a whole number <= 1000000000"),
        ({"vocab_size": 10**8}, "vocab_size: expected a whole number <= 10000000"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings: expected a whole number <= 1000000000"),
        ({"rms_norm_eps": -1}, r"rms_norm_eps: expected a number > 0\.0"),
        ({"num_experts_per_tok": 385}, "num_experts_per_tok 385 is more than n_routed_experts 384"),
        ({"n_group": 7}, "n_group 7 must divide n_routed_experts 384"),
        ({"n_group": 2, "topk_group": 3}, "topk_group 3 is more than n_group 2"),
        ({"n_group": 96}, "num_experts_per_tok is more than the chosen groups hold"),
        ({"rope_scaling": None}, "rope_scaling is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "unknown rope_scaling type 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, r"rope: missing required field"),
        (
            {"rope_scaling": thinking_config_fields()["rope_scaling"] | {"factor": 0}},
            r"rope.factor: expected a number >= 1e-06",
        ),
        ({"rope_theta": -1.0}, r"rope.theta: expected a number >= 1\.001"),
        ({"quantization_config": None}, "quantization_config is missing"),
        ({"quantization_config": {"quant_method": "fp8"}}, "experts quantized as 'fp8' cannot be read"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}},
            "experts quantized as 'compressed-tensors mxfp4-pack-quantized' cannot be read",
        ),
        ({"quantization_config": quantization_with(num_bits=8)}, "quantized weights have num_bits 8, not 4"),
        ({"quantization_config": quantization_with(group_size=128)}, "quantized weights have group_size 128, not 32"),
        (
            {"quantization_config": quantization_with(symmetric=False)},
            "quantized weights have symmetric False, not True",
        ),
        ({"quantization_config": quantization_with(type="float")}, "quantized weights have type 'float', not 'int'"),
    ],
)
def test_an_unsupported_config_value_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json.*{reason}"):
        read_config(thinking_config_fields(**changes))


@pytest.mark.parametrize("wrap", [dict, as_kimi_k25])
def test_a_checkpoint_converted_for_mlx_is_refused_with_the_original_repository(wrap: Any) -> None:
    converted = wrap(thinking_config_fields()) | {"quantization": {"group_size": 32, "bits": 4}}
    with pytest.raises(ConfigError, match=r"converted for MLX; fetch the original .*Kimi-K2-Thinking \(594 GB\)"):
        read_config(converted)


@given(name=st.sampled_from(sorted(thinking_config_fields())), value=JSON_VALUES)
def test_any_value_in_a_config_field_is_read_or_refused(name: str, value: Any) -> None:
    try:
        read_config(thinking_config_fields(**{name: value}))
    except ConfigError as error:
        assert str(error).startswith("config.json")


@given(name=st.sampled_from(sorted(thinking_config_fields()["rope_scaling"])), value=JSON_VALUES)
def test_any_value_in_a_rope_field_is_read_or_refused(name: str, value: Any) -> None:
    rope = thinking_config_fields()["rope_scaling"] | {name: value}
    try:
        config = read_config(thinking_config_fields(rope_scaling=rope))
        assert config.softmax_scale > 0
    except ConfigError as error:
        assert str(error).startswith("config.json")


STRICT_OBJECTS = st.sampled_from(["rope", "quantization", "group", "weights"])
EMPTY_VALUES: st.SearchStrategy[Any] = st.sampled_from([None, {}, []])
UNKNOWN_NAMES = st.text("abcdefghij_", min_size=1, max_size=8)  # no field of these objects has only these letters
OTHER_VALUES = JSON_VALUES.filter(lambda value: value not in (None, {}, []))


def strict_objects(fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the objects of a config in which every field can change the computation, by the names STRICT_OBJECTS."""
    quantization = fields["quantization_config"]
    (group,) = quantization["config_groups"].values()
    return {
        "rope": fields["rope_scaling"],
        "quantization": quantization,
        "group": group,
        "weights": group["weights"],
    }


@given(object_name=STRICT_OBJECTS, name=UNKNOWN_NAMES, value=OTHER_VALUES)
def test_an_unknown_field_of_rope_or_quantization_is_refused_by_name_if_it_has_a_value(
    object_name: str, name: str, value: Any
) -> None:
    fields = config_with(object_name, **{name: value})
    with pytest.raises(ConfigError, match=rf"^config\.json: .*\b{name} .* is not implemented"):
        read_config(fields)


@given(object_name=STRICT_OBJECTS, name=UNKNOWN_NAMES, value=EMPTY_VALUES)
def test_an_empty_unknown_field_of_rope_or_quantization_is_ignored(object_name: str, name: str, value: Any) -> None:
    assert read_config(config_with(object_name, **{name: value})) == read_config(thinking_config_fields())


def config_with(object_name: str, **changes: Any) -> dict[str, Any]:
    """Return Kimi K2 Thinking's config with ``changes`` in one of its `strict_objects`."""
    fields = thinking_config_fields()
    strict_objects(fields)[object_name] |= changes
    return fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            config_with("quantization", transform_config={"config_groups": {"R1": {"type": "hadamard"}}}),
            "transform_config",
        ),
        (config_with("quantization", sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (config_with("quantization", kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (config_with("group", input_activations={"num_bits": 8}), "input_activations"),
        (config_with("group", format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (config_with("weights", actorder="group"), "actorder 'group'"),
        (config_with("weights", dynamic=True), "dynamic True"),
        (config_with("rope", attention_factor=1.0), "attention_factor"),
        (config_with("rope", truncate=False), "truncate False"),
        (config_with("rope", rope_type="linear"), "unknown rope_scaling type 'linear'"),
        (
            thinking_config_fields() | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "factor is 64.0, and 2.0",
        ),
        (
            thinking_config_fields() | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 2.0}},
            "theta is 50000.0, and",
        ),
        (thinking_config_fields() | {"rope_interleave": False}, "rope_interleave False"),
        (thinking_config_fields() | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (thinking_config_fields() | {"use_qk_norm": True}, "use_qk_norm True"),
        (thinking_config_fields() | {"index_topk": 2048}, "index_topk 2048"),
        (thinking_config_fields() | {"linear_attn_config": {"short_conv_kernel_size": 4}}, "linear_attn_config"),
        (
            thinking_config_fields() | {"embedding_multiplier": 12.0},
            "embedding_multiplier 12.0 is not implemented (only 1)",
        ),
        (thinking_config_fields() | {"attn_output_gate": True}, "attn_output_gate True"),
        (thinking_config_fields() | {"layer_types": ["full_attention", "linear_attention"]}, "layer_types other than"),
        (thinking_config_fields() | {"layer_types": "full_attention"}, "layer_types other than"),
        (as_kimi_k25(thinking_config_fields()) | {"tie_word_embeddings": True}, "tie_word_embeddings True"),
    ],
)
def test_a_field_that_changes_the_computation_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_config(fields)


@pytest.mark.parametrize(
    "fields",
    [
        config_with("rope", type=None, rope_type="yarn", truncate=True),
        config_with("weights", actorder="static", scale_dtype="bfloat16"),
        config_with("group", format="pack-quantized"),
        thinking_config_fields() | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 50000, "factor": 64}},
        thinking_config_fields() | {"rope_interleave": True, "partial_rotary_factor": 1.0, "use_qk_norm": None},
        thinking_config_fields() | {"layer_types": ["full_attention"] * 61, "logits_scaling": 1.0, "scale_emb": None},
    ],
)
def test_a_default_that_is_written_out_changes_nothing(fields: dict[str, Any]) -> None:
    assert read_config(fields) == read_config(thinking_config_fields())


def test_an_eos_token_outside_the_text_config_is_used_if_the_one_inside_is_null() -> None:
    fields = as_kimi_k25(thinking_config_fields(eos_token_id=None)) | {"eos_token_id": 7}
    assert read_config(fields).eos_token_ids == (7,)
