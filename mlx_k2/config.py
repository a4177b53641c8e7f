"""ModelConfig: the model's fields from config.json, checked and frozen. Knows no tensors and no other files."""

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
    """Supported checkpoint family."""

    KIMI_K2 = "kimi_k2"
    KIMI_K25 = "kimi_k25"


# Far above every model of the family. Larger values would fill memory before a missing tensor is noticed.
_MAX_VALUE = 10**9
_MAX_VOCAB = 10**7
_MAX_EXPERTS = 10**5  # of all layers together; Kimi K2 has 23,424

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=_MAX_VALUE)]
_CountOr0: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=_MAX_VALUE)]
_Groups: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=_MAX_VALUE, multiple_of=32)]
"""A multiple of the number of INT4 weights that share a scale."""
_Positive: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
_Factor: TypeAlias = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """YaRN's parameters, named as in config.json."""

    theta: Annotated[float, msgspec.Meta(ge=1.001, le=1e12)]
    factor: _Factor
    original_max_position_embeddings: Annotated[int, msgspec.Meta(gt=0, le=_MAX_VALUE)]
    beta_fast: _Factor
    beta_slow: _Factor
    mscale: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    mscale_all_dim: Annotated[float, msgspec.Meta(ge=0, le=1e6)]

    def temperature(self, mscale: float) -> float:
        """Return YaRN's factor on attention scores for a context that is ``factor`` times as long."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of one Kimi K2 model; field names are those of config.json."""

    family: Family
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=_MAX_VOCAB)]
    hidden_size: _Groups
    num_hidden_layers: _Count
    num_attention_heads: _Count
    q_lora_rank: _Count | None
    kv_lora_rank: _Count
    qk_nope_head_dim: _Count
    qk_rope_head_dim: Annotated[int, msgspec.Meta(ge=2, le=_MAX_VALUE, multiple_of=2)]
    v_head_dim: _Count
    intermediate_size: _Count
    moe_intermediate_size: _Groups
    n_routed_experts: _Count
    num_experts_per_tok: _Count
    n_shared_experts: _CountOr0
    first_k_dense_replace: _CountOr0
    moe_layer_freq: _Count
    n_group: _Count
    topk_group: _Count
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: _Positive
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
        """Values cached for each token and layer: the compressed keys and values, and the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on attention scores. YaRN's temperature enters squared (DeepSeek-V3, modeling code)."""
        temperature = self.rope.temperature(self.rope.mscale_all_dim)
        return float(self.qk_head_dim**-0.5 * temperature * temperature)

    def is_moe(self, layer: int) -> bool:
        """Return True if ``layer`` has routed experts (else it is dense)."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @classmethod
    def from_json(cls, data: bytes, source: str) -> "ModelConfig":
        """Parse the bytes of config.json. ``source`` names them in errors.

        Raises:
            ConfigError: not JSON, a field is missing or of the wrong type, or a value is not implemented.
        """
        try:
            outer = read_json(data, dict[str, Any])
        except JsonError as error:
            raise ConfigError(f"{source} is not a JSON object: {error}") from None
        family = _family(outer, source)
        fields = dict(outer["text_config"]) if family is Family.KIMI_K25 else dict(outer)
        for name in ("quantization", "quantization_config"):
            if name in outer:
                fields.setdefault(name, outer[name])
        _refuse_unsupported(outer, fields, source)
        fields |= {"family": family.value, "rope": read_rope(fields, source), "eos_token_ids": _eos(outer, fields)}
        fields.setdefault("q_lora_rank", None)
        try:
            config = convert(fields, cls)
        except JsonError as error:
            raise ConfigError(f"{source}: {error}") from None
        config._check_shape(source)
        return config

    def _check_shape(self, source: str) -> None:
        """Refuse values that contradict each other."""
        demands = {
            f"{self.num_hidden_layers} layers of {self.n_routed_experts} experts are more than {_MAX_EXPERTS}": (
                self.num_hidden_layers * self.n_routed_experts <= _MAX_EXPERTS
            ),
            f"num_experts_per_tok {self.num_experts_per_tok} is more than n_routed_experts {self.n_routed_experts}": (
                self.num_experts_per_tok <= self.n_routed_experts
            ),
            f"n_group {self.n_group} must divide n_routed_experts {self.n_routed_experts}": (
                self.n_routed_experts % self.n_group == 0
            ),
            f"topk_group {self.topk_group} is more than n_group {self.n_group}": self.topk_group <= self.n_group,
            "num_experts_per_tok is more than the chosen groups hold": (
                self.num_experts_per_tok * self.n_group <= self.n_routed_experts * self.topk_group
            ),
        }
        for demand, holds in demands.items():
            if not holds:
                raise ConfigError(f"{source}: {demand}")


def _family(outer: Mapping[str, Any], source: str) -> Family:
    model_type = outer.get("model_type")
    if model_type == "kimi_k3":
        raise ConfigError(f"{source}: Kimi K3 has another architecture, which mlx-k2 does not run; {_FETCH_ORIGINAL}")
    if model_type not in [family.value for family in Family]:
        raise ConfigError(f"{source}: model_type {model_type!r} is not one that mlx-k2 runs (kimi_k2, kimi_k25)")
    family = Family(model_type)
    if family is Family.KIMI_K25 and not isinstance(outer.get("text_config"), dict):
        raise ConfigError(f"{source}: a kimi_k25 config needs a text_config object")
    return family


# Fields whose value changes the computation, with the values that this program computes. null, {} and [] always pass.
COMPUTED: Mapping[str, tuple[object, ...]] = {
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
# The same for rope_scaling and for the objects of quantization_config, in which every other field is refused.
_COMPUTED_INSIDE: Mapping[str, tuple[object, ...]] = {
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
_IGNORED = (
    *("quantization_status", "version", "ignore", "config_groups", "global_compression_ratio", "targets", "weights"),
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
)


def _refuse_unsupported(outer: Mapping[str, Any], fields: Mapping[str, Any], source: str) -> None:
    """Reject values that change the computation and that this program does not implement."""
    if "quantization" in fields:
        raise ConfigError(f"{source}: this checkpoint was converted for MLX; {_FETCH_ORIGINAL}")
    _refuse_quantization(fields.get("quantization_config"), source)
    for given in (outer, fields):
        refuse_others({name: given[name] for name in COMPUTED.keys() & given.keys()}, COMPUTED, source)
    kinds = fields.get("layer_types")
    if kinds and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        raise ConfigError(f"{source}: layer_types other than 'full_attention' are not implemented")


def refuse_others(fields: Mapping[str, Any], computed: Mapping[str, tuple[object, ...]], where: str) -> None:
    """Reject each field whose value is neither empty nor one of its ``computed`` values."""
    for name, value in fields.items():
        allowed = computed.get(name, ())
        is_bool = isinstance(value, bool)
        if value not in (None, {}, []) and not any(
            value == one and is_bool == isinstance(one, bool) for one in allowed
        ):
            only = f" (only {allowed[0]!r})" if allowed else ""
            raise ConfigError(f"{where}: {name} {value!r} is not implemented{only}")


def _refuse_quantization(quantization: object, source: str) -> None:
    if not isinstance(quantization, dict):
        raise ConfigError(f"{source}: quantization_config is missing, so the experts are not INT4; {_FETCH_ORIGINAL}")
    method, layout = quantization.get("quant_method"), quantization.get("format")
    if method != "compressed-tensors" or layout != "pack-quantized":
        found = f"{method} {layout}" if layout else method
        raise ConfigError(f"{source}: experts quantized as {found!r} cannot be read; {_FETCH_ORIGINAL}")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ConfigError(f"{source}: quantization_config.config_groups must hold exactly one group")
    ((name, group),) = groups.items()
    group = group if isinstance(group, dict) else {}
    weights = group.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    for field in ("num_bits", "type", "symmetric", "strategy", "group_size"):
        expected, found = _COMPUTED_INSIDE[field][0], weights.get(field)
        if found != expected:
            raise ConfigError(
                f"{source}: quantized weights have {field} {found!r}, not {expected!r}; {_FETCH_ORIGINAL}"
            )
    where = f"{source}: quantization_config"
    for fields, name_in_it in ((quantization, ""), (group, f".config_groups.{name}"), (weights, ".weights")):
        where += name_in_it
        refuse_others(_without(fields, _IGNORED), _COMPUTED_INSIDE, where)


def _without(fields: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def read_rope(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return YaRN's parameters from either spelling: rope_scaling + rope_theta, or transformers 5's rope_parameters."""
    spellings = [name for name in ("rope_scaling", "rope_parameters") if fields.get(name)]
    if not spellings:
        raise ConfigError(f"{source}: rope_scaling is missing")
    theta = fields.get("rope_theta")
    given = {"rope_theta": {} if theta is None else {"theta": theta}}
    given |= {name: _yarn(fields[name], source, name) for name in spellings}
    rope: dict[str, Any] = {}
    for spelling, values in given.items():
        for name, value in values.items():
            if rope.setdefault(name, value) != value:
                raise ConfigError(f"{source}: {name} is {rope[name]!r}, and {value!r} in {spelling}: they contradict")
    return rope


def _yarn(scaling: object, source: str, spelling: str) -> dict[str, Any]:
    if not isinstance(scaling, dict):
        raise ConfigError(f"{source}: {spelling} is not an object")
    for rope_type in [scaling[name] for name in ("type", "rope_type") if scaling.get(name) is not None] or [None]:
        if rope_type != "yarn":
            raise ConfigError(f"{source}: unknown {spelling} type {rope_type!r} (only 'yarn')")
    names = {name for name in RopeConfig.__struct_fields__ if name != "theta"}
    refuse_others(
        _without(scaling, ("type", "rope_type", "rope_theta", *names)), _COMPUTED_INSIDE, f"{source}: {spelling}"
    )
    rope = {name: value for name, value in scaling.items() if name in names}
    theta = scaling.get("rope_theta")
    return rope if theta is None else rope | {"theta": theta}


def _eos(outer: Mapping[str, Any], fields: Mapping[str, Any]) -> list[Any]:
    inner = fields.get("eos_token_id")
    found = outer.get("eos_token_id") if inner is None else inner
    return found if isinstance(found, list) else [] if found is None else [found]
