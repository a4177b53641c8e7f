"""The fields of a model's config.json, checked and frozen. Knows no tensors and no other files."""

import enum
import math
from collections.abc import Collection, Mapping
from typing import Annotated, Any, TypeAlias

import msgspec

from mlx_k2.errors import ConfigError
from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import convert, read_json

ORIGINAL_REPO = "moonshotai/Kimi-K2-Thinking"
_FETCH_ORIGINAL = f"fetch the original INT4 checkpoint instead, for instance {ORIGINAL_REPO} (594 GB)"


class Family(enum.Enum):
    """The supported families of checkpoints, by the ``model_type`` of their config.json."""

    KIMI_K2 = "kimi_k2"
    KIMI_K25 = "kimi_k25"


# Far above every model of the family. Larger values would fill memory before a missing tensor is noticed.
_MAX_VALUE = 10**9
_MAX_VOCAB = 10**7
_MAX_EXPERTS = 10**5  # of all layers together; Kimi K2 has 23,424

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=_MAX_VALUE)]
_CountOr0: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=_MAX_VALUE)]
_GroupedSize: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=_MAX_VALUE, multiple_of=32)]
"""A size that divides into groups of 32 INT4 weights, each with one scale."""
_PositiveFloat: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
_Factor: TypeAlias = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """YaRN's parameters, named as in config.json, except that ``theta`` is rope_theta there."""

    theta: Annotated[float, msgspec.Meta(ge=1.001, le=1e12)]
    factor: _Factor
    original_max_position_embeddings: Annotated[int, msgspec.Meta(gt=0, le=_MAX_VALUE)]
    beta_fast: _Factor
    beta_slow: _Factor
    mscale: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    mscale_all_dim: Annotated[float, msgspec.Meta(ge=0, le=1e6)]

    def temperature(self, mscale: float) -> float:
        """Return YaRN's attention temperature: 0.1 * ``mscale`` * ln(``factor``) + 1; 1 if ``factor`` is at most 1."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of one Kimi K2 model. Names are config.json's, except ``family``, ``rope`` and ``eos_token_ids``."""

    family: Family
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=_MAX_VOCAB)]
    hidden_size: _GroupedSize
    num_hidden_layers: _Count
    num_attention_heads: _Count
    q_lora_rank: _Count | None
    kv_lora_rank: _Count
    qk_nope_head_dim: _Count
    qk_rope_head_dim: Annotated[int, msgspec.Meta(ge=2, le=_MAX_VALUE, multiple_of=2)]
    v_head_dim: _Count
    intermediate_size: _Count
    moe_intermediate_size: _GroupedSize
    n_routed_experts: _Count
    num_experts_per_tok: _Count
    n_shared_experts: _CountOr0
    first_k_dense_replace: _CountOr0
    moe_layer_freq: _Count
    n_group: _Count
    topk_group: _Count
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: _PositiveFloat
    max_position_embeddings: _Count
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]

    @property
    def tensor_prefix(self) -> str:
        """Prefix before ``model.`` and ``lm_head.`` in every tensor's name."""
        return "language_model." if self.family is Family.KIMI_K25 else ""

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without position and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_row_dim(self) -> int:
        """Number of values cached for each token and layer: the compressed keys and values, and the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on attention scores. YaRN's temperature is squared in it (DeepSeek-V3, modeling code)."""
        temperature = self.rope.temperature(self.rope.mscale_all_dim)
        return float(self.qk_head_dim**-0.5 * temperature * temperature)

    def is_moe(self, layer: int) -> bool:
        """Return whether ``layer`` has routed experts; a layer without them is dense."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @classmethod
    def from_json(cls, data: bytes, source: str) -> "ModelConfig":
        """Parse the bytes of a config.json, which ``source`` names in errors.

        Raises:
            ConfigError: ``data`` is not JSON, a field is missing or of the wrong type, or a value is not implemented.
        """
        try:
            root = read_json(data, dict[str, Any])
        except JsonError as error:
            raise ConfigError(f"{source} is not a JSON object: {error}") from None
        family = _family(root, source)
        fields = dict(root["text_config"]) if family is Family.KIMI_K25 else dict(root)
        for name in ("quantization", "quantization_config"):  # a kimi_k25 file may have them beside text_config
            if name in root:
                fields.setdefault(name, root[name])
        _check_supported(root, fields, source)
        fields["eos_token_ids"] = _eos_token_ids(root, fields)
        fields |= {"family": family.value, "rope": read_rope(fields, source)}
        fields.setdefault("q_lora_rank", None)
        try:
            config = convert(fields, cls)
        except JsonError as error:
            raise ConfigError(f"{source}: {error}") from None
        config._check_shape(source)
        return config

    def _check_shape(self, source: str) -> None:
        """Refuse values that contradict each other."""
        experts, per_token = self.n_routed_experts, self.num_experts_per_tok
        if self.num_hidden_layers * experts > _MAX_EXPERTS:
            problem = f"{self.num_hidden_layers} layers of {experts} experts are more than {_MAX_EXPERTS}"
        elif per_token > experts:
            problem = f"num_experts_per_tok {per_token} is more than n_routed_experts {experts}"
        elif experts % self.n_group != 0:
            problem = f"n_group {self.n_group} must divide n_routed_experts {experts}"
        elif self.topk_group > self.n_group:
            problem = f"topk_group {self.topk_group} is more than n_group {self.n_group}"
        elif per_token > experts // self.n_group * self.topk_group:
            problem = "num_experts_per_tok is more than the chosen groups hold"
        else:
            return
        raise ConfigError(f"{source}: {problem}")


def _family(root: Mapping[str, Any], source: str) -> Family:
    model_type = root.get("model_type")
    if model_type == "kimi_k3":
        raise ConfigError(f"{source}: Kimi K3 has another architecture, which mlx-k2 does not run; {_FETCH_ORIGINAL}")
    if model_type not in [family.value for family in Family]:
        raise ConfigError(f"{source}: model_type {model_type!r} is not one that mlx-k2 runs (kimi_k2, kimi_k25)")
    family = Family(model_type)
    if family is Family.KIMI_K25 and not isinstance(root.get("text_config"), dict):
        raise ConfigError(f"{source}: a kimi_k25 config needs a text_config object")
    return family


# Fields that change the computation, with the values that this program implements. null, {} and [] are always allowed.
SUPPORTED_VALUES: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "num_nextn_predict_layers": (0,),
    "rope_interleave": (True,),
    "partial_rotary_factor": (1,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
    "sliding_window": (),
    "attention_chunk_size": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "swiglu_limit": (),
    "attn_output_gate": (False,),
    "linear_attn_config": (),
    "residual_multiplier": (1,),
    "embedding_multiplier": (1,),
    "attention_multiplier": (),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "index_topk": (),
    "index_n_heads": (),
    "index_head_dim": (),
}
# The same for rope_scaling, and for quantization_config and the objects in it. There, a field with a value is refused
# if it is neither listed here nor in _IGNORED_QUANTIZATION_FIELDS nor a field of RopeConfig.
_SUPPORTED_NESTED_VALUES: Mapping[str, tuple[object, ...]] = {
    "truncate": (True,),
    "partial_rotary_factor": (1,),
    "quant_method": ("compressed-tensors",),
    "format": ("pack-quantized",),
    "num_bits": (4,),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("group",),
    "group_size": (32,),
    "dynamic": (False,),
    "actorder": ("static", "weight"),
}
_IGNORED_QUANTIZATION_FIELDS = (
    *("quantization_status", "version", "ignore", "config_groups", "global_compression_ratio", "targets", "weights"),
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
)


def _check_supported(root: Mapping[str, Any], fields: Mapping[str, Any], source: str) -> None:
    """Refuse values that change the computation and that this program does not implement."""
    if "quantization" in fields:
        raise ConfigError(f"{source}: this checkpoint was converted for MLX; {_FETCH_ORIGINAL}")
    _check_quantization(fields.get("quantization_config"), source)
    check_listed_fields(root, SUPPORTED_VALUES, source)
    check_listed_fields(fields, SUPPORTED_VALUES, source)
    layer_types = fields.get("layer_types")
    if layer_types and not (isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)):
        raise ConfigError(f"{source}: layer_types other than 'full_attention' are not implemented")


def check_listed_fields(fields: Mapping[str, Any], supported: Mapping[str, tuple[object, ...]], where: str) -> None:
    """Refuse nonempty values that ``supported`` does not list for a field; other fields may have any value.

    ``where`` names the object in errors.
    """
    _check_all_fields({name: fields[name] for name in supported.keys() & fields.keys()}, supported, where)


def _check_all_fields(fields: Mapping[str, Any], supported: Mapping[str, tuple[object, ...]], where: str) -> None:
    """Refuse each field whose value is neither empty nor one of its ``supported`` values."""
    for name, value in fields.items():
        allowed = supported.get(name, ())
        is_allowed = any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed)
        if value not in (None, {}, []) and not is_allowed:
            only = f" (only {allowed[0]!r})" if allowed else ""
            raise ConfigError(f"{where}: {name} {value!r} is not implemented{only}")


def _check_quantization(quantization: object, source: str) -> None:
    if not isinstance(quantization, dict):
        raise ConfigError(f"{source}: quantization_config is missing, so the experts are not INT4; {_FETCH_ORIGINAL}")
    method, layout = quantization.get("quant_method"), quantization.get("format")
    if method != "compressed-tensors" or layout != "pack-quantized":
        actual = f"{method} {layout}" if layout else method
        raise ConfigError(f"{source}: experts quantized as {actual!r} cannot be read; {_FETCH_ORIGINAL}")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ConfigError(f"{source}: quantization_config.config_groups must hold exactly one group")
    ((name, group),) = groups.items()
    group = group if isinstance(group, dict) else {}
    weights = group.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    for field in ("num_bits", "type", "symmetric", "strategy", "group_size"):
        expected, actual = _SUPPORTED_NESTED_VALUES[field][0], weights.get(field)
        if actual != expected:
            raise ConfigError(
                f"{source}: quantized weights have {field} {actual!r}, not {expected!r}; {_FETCH_ORIGINAL}"
            )
    where = f"{source}: quantization_config"
    group_where = f"{where}.config_groups.{name}"
    for fields, path in ((quantization, where), (group, group_where), (weights, f"{group_where}.weights")):
        _check_all_fields(_without(fields, _IGNORED_QUANTIZATION_FIELDS), _SUPPORTED_NESTED_VALUES, path)


def _without(fields: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def read_rope(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the fields of a RopeConfig from rope_scaling and rope_theta, or from transformers 5's rope_parameters.

    Raises:
        ConfigError: both are missing, they contradict each other, or a value is not implemented.
    """
    objects = {name: fields[name] for name in ("rope_scaling", "rope_parameters") if fields.get(name)}
    if not objects:
        raise ConfigError(f"{source}: rope_scaling is missing")
    theta = fields.get("rope_theta")
    rope: dict[str, Any] = {} if theta is None else {"theta": theta}
    for object_name, scaling in objects.items():
        for name, value in _yarn_fields(scaling, source, object_name).items():
            if rope.setdefault(name, value) != value:
                raise ConfigError(
                    f"{source}: {name} is {rope[name]!r}, and {value!r} in {object_name}: they contradict"
                )
    return rope


def _yarn_fields(scaling: object, source: str, object_name: str) -> dict[str, Any]:
    if not isinstance(scaling, dict):
        raise ConfigError(f"{source}: {object_name} is not an object")
    types = [scaling[name] for name in ("type", "rope_type") if scaling.get(name) is not None]
    for rope_type in types or [None]:
        if rope_type != "yarn":
            raise ConfigError(f"{source}: unknown {object_name} type {rope_type!r} (only 'yarn')")
    names = {name for name in RopeConfig.__struct_fields__ if name != "theta"}
    others = _without(scaling, ("type", "rope_type", "rope_theta", *names))
    _check_all_fields(others, _SUPPORTED_NESTED_VALUES, f"{source}: {object_name}")
    rope = {name: value for name, value in scaling.items() if name in names}
    theta = scaling.get("rope_theta")
    return rope if theta is None else rope | {"theta": theta}


def _eos_token_ids(root: Mapping[str, Any], fields: Mapping[str, Any]) -> list[Any]:
    """Return the ids as a list. Ids in ``fields``, of the text model, override those in ``root``, of the whole file."""
    token_ids = root.get("eos_token_id") if fields.get("eos_token_id") is None else fields["eos_token_id"]
    if token_ids is None:
        return []
    return token_ids if isinstance(token_ids, list) else [token_ids]
