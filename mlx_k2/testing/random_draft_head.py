"""A writer of random EAGLE-3 draft heads, for tests and benchmarks."""

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mlx_k2.config import ModelConfig
from mlx_k2.testing.random_checkpoint import bf16_bytes
from mlx_k2.weights.draft_head import ARCHITECTURES, D2T, EMBEDDING, LM_HEAD, describe_draft
from mlx_k2.weights.index import CONFIG_NAME, INDEX_NAME, SINGLE_FILE_NAME
from mlx_k2.weights.inventory import TensorSpec
from mlx_k2.weights.model_source import DraftHead, ModelSource
from mlx_k2.weights.safetensors_file import write_file


def draft_config_fields(target: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the fields of a draft head's config.json, with ``changes``.

    ``target`` is the config.json of the model for which the head drafts.
    """
    shared_names = (
        *("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank"),
        *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rms_norm_eps", "rope_theta", "rope_scaling"),
    )
    return {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "kimi_k2",
        "num_hidden_layers": 1,
        **{name: target[name] for name in shared_names},
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
        **changes,
    }


def write_random_draft_head(
    folder: Path,
    config_fields: Mapping[str, Any],
    target: ModelConfig,
    seed: int,
    *,
    own_tensors: tuple[str, ...] = (LM_HEAD, EMBEDDING),
    fc_norms: bool = False,
    layer_prefix: str = "layers.0",
) -> None:
    """Write a head for ``target`` to ``folder``: config.json and model.safetensors. Equal arguments give equal bytes.

    ``own_tensors`` are those that the head does not share with the target. If the fields have ``draft_vocab_size``, the
    head drafts this number of the target's tokens, chosen at random. ``fc_norms``: the head has norms before ``fc``.
    """
    config_json = msgspec.json.format(msgspec.json.encode(config_fields), indent=2)
    num_norms = len(config_fields["eagle_config"]["eagle_aux_hidden_state_layer_ids"]) if fc_norms else 0
    norm_names = [f"fc_norm.{index}.weight" for index in range(num_norms)]
    name_with_prefix = f"{layer_prefix}.hidden_norm.weight"  # the name that shows the layer's prefix
    specs = _specs(config_json, target, [*own_tensors, *norm_names, name_with_prefix])
    folder.mkdir(parents=True)
    (folder / CONFIG_NAME).write_bytes(config_json)
    write_file(folder / SINGLE_FILE_NAME, specs, lambda spec: _random_bytes(spec, target.vocab_size, seed))


def _specs(config_json: bytes, target: ModelConfig, names: list[str]) -> tuple[TensorSpec, ...]:
    """Return the specs of a head. ``names`` are the tensors in its index that show which optional parts it has."""
    fields = msgspec.json.decode(config_json)
    if fields.get("draft_vocab_size", target.vocab_size) < target.vocab_size:
        names = [*names, D2T]
    weight_map = dict.fromkeys(names, SINGLE_FILE_NAME)
    head = DraftHead(source=ModelSource(path_or_repo="random"))
    files = {CONFIG_NAME: config_json, INDEX_NAME: msgspec.json.encode({"weight_map": weight_map})}
    return describe_draft(files, head, target, check_names=False).specs()


def _random_bytes(spec: TensorSpec, vocab_size: int, seed: int) -> Iterator[bytes]:
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(spec.name.encode())]))
    if spec.name == D2T:
        token_ids = np.sort(generator.choice(vocab_size, spec.shape[0], replace=False))
        # a token's id minus the number of its row
        yield (token_ids - np.arange(spec.shape[0])).astype("<i8").tobytes()
    elif len(spec.shape) == 1:
        yield bf16_bytes(generator.uniform(0.5, 1.5, spec.shape[0]).astype(np.float32))
    else:
        gain = 3.0 if spec.name == LM_HEAD else 1.2  # as in random_checkpoint
        deviation = 1.0 if spec.name == EMBEDDING else gain / spec.shape[1] ** 0.5
        yield bf16_bytes(generator.standard_normal(spec.shape, np.float32).ravel() * np.float32(deviation))
