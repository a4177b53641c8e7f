"""A draft head (EAGLE-3, arXiv 2503.01840): its config, its tensors, and the target's on each stage. Reads no tensor.

The head is one decoder layer with multi-head latent attention and a dense SwiGLU block. It drafts for another model,
the target, and reads the outputs of some of the target's layers: their product with ``fc`` is called features. The
head's first projections have twice the target's hidden size as inputs: the embedding of a token, and the features of
the position before it. A head without an embedding or an output projection uses the target's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from mlx_k2.config import SUPPORTED_VALUES, ModelConfig, RopeConfig, check_listed_fields, read_rope
from mlx_k2.errors import CheckpointError, ConfigError, RequestError
from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import convert, read_json
from mlx_k2.weights.index import CONFIG_NAME, INDEX_NAME, CheckpointIndex, model_digest, refuse_names
from mlx_k2.weights.inventory import (
    DenseMatrix,
    TensorSpec,
    attention_specs,
    bf16_spec,
    embedding_specs,
    held_bytes,
    linear_spec,
    mlp_specs,
    shard_specs,
)
from mlx_k2.weights.model_source import DraftHead

ARCHITECTURES = ("Eagle3DeepseekV2ForCausalLM", "Eagle3DeepseekV3ForCausalLM")
FC, LM_HEAD, EMBEDDING, NORM, D2T = "fc.weight", "lm_head.weight", "embed_tokens.weight", "norm.weight", "d2t"
"""D2T has, for each row of the output projection, the target's token id minus the number of the row."""
"""D2T has, for each row of the output projection, the target's token id minus the number of the row."""
_UNREAD_TENSORS = ("t2d",)
"""Names of tensors that are not read: t2d (whether the head drafts a token of the target) follows from d2t."""
_LAYER_PREFIXES = ("layers.0", "midlayer")
"""Beginnings of the names of the decoder layer's tensors: Model-Optimizer's, and SpecForge's."""
_SUPPORTED_EAGLE_VALUES: Mapping[str, tuple[object, ...]] = {
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
    "norm_before_residual": (False,),
    "parallel_draft_step": (1,),
}
"""Fields of eagle_config that change the computation, with the values that this program implements."""

_NUM_CONTROL_TOKENS = 256
"""Number of control tokens at the end of Kimi's vocabulary."""

_Size = Annotated[int, msgspec.Meta(ge=1, le=10**9)]


class _ConfigFile(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a head's config.json that this program reads. ``rope`` is made of several."""

    hidden_size: _Size
    vocab_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    q_lora_rank: _Size | None = None
    kv_lora_rank: _Size
    qk_nope_head_dim: _Size
    qk_rope_head_dim: _Size
    v_head_dim: _Size
    rms_norm_eps: Annotated[float, msgspec.Meta(gt=0)]
    rope: RopeConfig
    draft_vocab_size: _Size | None = None
    eagle_aux_hidden_state_layer_ids: tuple[int, ...] | None = None
    norm_output: bool = False


@dataclass(frozen=True)
class DraftDescription:
    """A draft head for one target. ``aux_layers`` are the target's layers, counted from 0, whose outputs it reads.

    ``layer`` is the head's decoder layer as a model config with one dense layer; its tensors' names begin with
    ``layer_prefix``. ``num_rows`` is the number of rows of the output projection, the head's own or the target's;
    ``num_drafted_ids`` of these rows are kept in memory. With ``norms_output`` the features that the head computes for
    its next draft token are normed. ``digest`` identifies the head's files.
    """

    layer: ModelConfig
    aux_layers: tuple[int, ...]
    num_rows: int
    num_drafted_ids: int
    layer_prefix: str
    norms_output: bool
    index: CheckpointIndex
    digest: str

    @property
    def has_aux_norms(self) -> bool:
        """Whether each layer's output is normed before ``fc`` (EAGLE 3.1)."""
        return "fc_norm.0.weight" in self.index.weight_map

    def aux_specs(self) -> tuple[TensorSpec, ...]:
        """Return the specs of the tensors that stages with ``aux_layers`` read: ``fc``, and the norms before it."""
        hidden, num_layers = self.layer.hidden_size, len(self.aux_layers)
        fc = TensorSpec(FC, "BF16", (hidden, num_layers * hidden), (DenseMatrix(hidden, hidden),) * num_layers)
        num_norms = num_layers if self.has_aux_norms else 0
        return (fc, *(bf16_spec(f"fc_norm.{index}.weight", hidden) for index in range(num_norms)))

    def layer_specs(self) -> tuple[TensorSpec, ...]:
        """Return the specs of the decoder layer, with the head's prefix, and of the norm after it."""
        prefix, hidden = self.layer_prefix, self.layer.hidden_size
        norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        return (
            *(bf16_spec(f"{prefix}.{name}.weight", hidden) for name in norms),
            *attention_specs(self.layer, f"{prefix}.self_attn", 2 * hidden),
            *mlp_specs(f"{prefix}.mlp", hidden, self.layer.intermediate_size),
            bf16_spec(NORM, hidden),
        )

    def own_specs(self) -> tuple[TensorSpec, ...]:
        """Return the specs of output projection, embedding and d2t, as far as the head has them."""
        hidden = self.layer.hidden_size
        specs = (
            linear_spec(LM_HEAD, self.num_rows, hidden),
            bf16_spec(EMBEDDING, self.layer.vocab_size, hidden),
            TensorSpec(D2T, "I64", (self.num_rows,)),
        )
        return tuple(spec for spec in specs if spec.name in self.index.weight_map)

    def specs(self) -> tuple[TensorSpec, ...]:
        """Return the specs of all of the head's tensors that are read."""
        return (*self.aux_specs(), *self.layer_specs(), *self.own_specs())

    def slice_bytes(self, compute_bytes: int, bits: int | None) -> int:
        """Return the bytes in memory of one aux layer's slice of ``fc`` and its norm, which are read for each token."""
        hidden = self.layer.hidden_size
        norm = hidden * compute_bytes if self.has_aux_norms else 0
        return DenseMatrix(hidden, hidden).held_bytes(compute_bytes, bits) + norm

    def layer_bytes(self, compute_bytes: int, bits: int | None) -> int:
        """Return the bytes in memory of the head's decoder layer and last norm, which are read for each draft token."""
        return held_bytes(self.layer_specs(), compute_bytes, bits)

    def projection_bytes(self, compute_bytes: int, bits: int | None) -> int:
        """Return the bytes in memory of the projection to the drafted ids: the head's, or a copy of the target's rows.

        It is 0 if the target's whole projection is used.
        """
        if LM_HEAD not in self.index.weight_map and self.num_drafted_ids == self.num_rows:
            return 0
        return DenseMatrix(self.num_drafted_ids, self.layer.hidden_size).held_bytes(compute_bytes, bits)

    def embedding_bytes(self, compute_bytes: int) -> int:
        """Return the bytes of the embedding (the head's or the target's) that the last of several stages holds."""
        return self.layer.vocab_size * self.layer.hidden_size * compute_bytes

    def is_read_by_stage(self, first_layer: int, end_layer: int, num_layers: int) -> bool:
        """Return whether the stage with the target's layers ``first_layer`` to ``end_layer`` - 1 reads the head."""
        return end_layer == num_layers or any(first_layer <= layer < end_layer for layer in self.aux_layers)


def stage_specs(
    target: ModelConfig, first_layer: int, end_layer: int, draft: DraftDescription | None
) -> tuple[TensorSpec, ...]:
    """Return the specs of the target's tensors that a stage reads.

    The last stage also reads the embedding if ``draft`` is a head that has no embedding of its own.
    """
    specs = shard_specs(target, first_layer, end_layer)
    is_last_of_several = end_layer == target.num_hidden_layers and first_layer > 0
    lacks_embedding = draft is not None and EMBEDDING not in draft.index.weight_map
    return specs + embedding_specs(target) if is_last_of_several and lacks_embedding else specs


def describe_draft(
    files: Mapping[str, bytes], head: DraftHead, target: ModelConfig, *, check_names: bool = True
) -> DraftDescription:
    """Return the description of ``head`` from its config and index.

    Without ``check_names`` tensors may be missing, and unknown ones are ignored.

    Raises:
        ConfigError, CheckpointError: the head is for another model or of an unsupported kind.
        RequestError: the options of ``head``, or the aux layers in its config, do not fit the head or the target.
    """
    source = head.source.path_or_repo
    for name in (CONFIG_NAME, INDEX_NAME):
        if name not in files:
            raise CheckpointError(f"--draft-model {source} has no {name}: it is not a draft head")
    where = f"--draft-model {source}/{CONFIG_NAME}"
    config = _read_config(files[CONFIG_NAME], where)
    _check_sizes(config, target, where)
    index = CheckpointIndex.from_json(files[INDEX_NAME], f"--draft-model {source}/{INDEX_NAME}")
    num_rows = config.draft_vocab_size or config.vocab_size
    if head.vocab_size is not None and head.vocab_size > num_rows:
        raise RequestError(f"--draft-vocab {head.vocab_size}: {source} has {num_rows} tokens: give at most as many")
    # the fields that a model's config has, too
    # the fields that a model's config has, too
    layer_fields = {name: getattr(config, name) for name in _ConfigFile.__struct_fields__ if hasattr(target, name)}
    prefixes = (prefix for prefix in _LAYER_PREFIXES if f"{prefix}.hidden_norm.weight" in index.weight_map)
    draft = DraftDescription(
        layer=msgspec.structs.replace(target, **layer_fields, first_k_dense_replace=1),
        aux_layers=_aux_layers(config, head, target.num_hidden_layers, where),
        num_rows=num_rows,
        num_drafted_ids=head.vocab_size or num_rows,
        layer_prefix=next(prefixes, _LAYER_PREFIXES[0]),
        norms_output=config.norm_output,
        index=index,
        digest=model_digest(files[CONFIG_NAME], files[INDEX_NAME]),
    )
    if check_names:
        _check_names(draft, source)
    return draft


def kept_rows(target_ids: Sequence[int], num_rows: int, vocab_size: int) -> list[int]:
    """Return the ``num_rows`` rows of a head's output projection to keep, ascending.

    ``target_ids`` has the target's token id of each row. The ids of a byte-pair vocabulary are in the order of its
    merges, so the most frequent tokens have the smallest ids. Control tokens are frequent, too, and have the largest
    ids: they get at most an eighth of the rows, so that even few rows are mostly for text.
    """
    if num_rows >= len(target_ids):
        return list(range(len(target_ids)))
    num_control = min(_NUM_CONTROL_TOKENS, num_rows // 8)
    control = [row for row, token_id in enumerate(target_ids) if token_id >= vocab_size - num_control]
    by_id = sorted(set(range(len(target_ids))) - set(control), key=lambda row: target_ids[row])
    return sorted(control + by_id[: num_rows - len(control)])


def _read_config(data: bytes, where: str) -> _ConfigFile:
    try:
        fields = read_json(data, dict[str, Any])
    except JsonError as error:
        raise ConfigError(f"{where} is not a JSON object: {error}") from None
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise ConfigError(f"{where}: architectures {names!r} is not a draft head that mlx-k2 runs ({ARCHITECTURES[0]})")
    eagle_fields = fields.get("eagle_config") or {}
    if not isinstance(eagle_fields, dict):
        raise ConfigError(f"{where}: eagle_config is not an object")
    fields = eagle_fields | fields  # eagle_config may have, for instance, the ids of the aux layers
    check_listed_fields(fields, {**SUPPORTED_VALUES, **_SUPPORTED_EAGLE_VALUES}, where)
    if "quantization_config" in fields:
        raise ConfigError(f"{where}: quantized draft heads cannot be read: give one in bfloat16")
    try:
        return convert(fields | {"rope": read_rope(fields, where)}, _ConfigFile)
    except JsonError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_sizes(config: _ConfigFile, target: ModelConfig, where: str) -> None:
    """Refuse a head for another model than ``target``, and a head whose own sizes are not supported."""
    for name in ("hidden_size", "vocab_size"):
        value, needed = getattr(config, name), getattr(target, name)
        if value != needed:
            raise ConfigError(f"{where}: {name} is {value}, and the model has {needed}: the head is for another model")
    if config.num_hidden_layers != 1:
        raise ConfigError(f"{where}: the head has {config.num_hidden_layers} layers, and mlx-k2 runs heads of one")
    if config.qk_rope_head_dim % 2:
        raise ConfigError(f"{where}: qk_rope_head_dim {config.qk_rope_head_dim} must be even")
    if config.draft_vocab_size is not None and config.draft_vocab_size > config.vocab_size:
        raise ConfigError(
            f"{where}: draft_vocab_size {config.draft_vocab_size} is above vocab_size {config.vocab_size}"
        )


def _aux_layers(config: _ConfigFile, head: DraftHead, num_layers: int, where: str) -> tuple[int, ...]:
    """Return the layers whose outputs the head reads: --draft-aux, its config's, or Model-Optimizer's default."""
    if head.aux_layers is not None:
        layers, origin = head.aux_layers, f"--draft-aux {','.join(map(str, head.aux_layers))}"
    else:
        default = {1, num_layers // 2 - 1, num_layers - 4}
        layers, origin = tuple(sorted(config.eagle_aux_hidden_state_layer_ids or default)), where
    if not layers or list(layers) != sorted(set(layers)):
        raise RequestError(f"{origin}: give each layer once, in ascending order, and at least one")
    if not 0 <= layers[0] <= layers[-1] < num_layers:
        raise RequestError(
            f"{origin}: the draft head reads layers {list(layers)}, and the model's are 0 to {num_layers - 1}"
        )
    return layers


def _check_names(draft: DraftDescription, source: str) -> None:
    """Check that the head has all tensors that its config requires, and no unknown ones."""
    names, needed = draft.index.weight_map.keys(), {spec.name for spec in draft.specs()}
    # A head with a smaller vocabulary cannot use the target's projection, nor row numbers as token ids.
    if draft.num_rows < draft.layer.vocab_size:
        needed |= {LM_HEAD, D2T}
    refuse_names(sorted(needed - names), f"--draft-model {source} lacks", "that its config.json requires")
    unknown = sorted(names - needed - set(_UNREAD_TENSORS))
    refuse_names(unknown, f"--draft-model {source} has", "that mlx-k2 does not know: it is another kind of head")
