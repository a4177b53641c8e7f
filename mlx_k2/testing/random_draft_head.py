"""A writer of random draft heads in the public format, for tests and benchmarks."""

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mlx_k2.config import ModelConfig
from mlx_k2.testing.random_checkpoint import bf16_bytes
from mlx_k2.weights.draft_head import ARCHITECTURES, EMBEDDING, LM_HEAD, TARGET_IDS, describe_draft
from mlx_k2.weights.index import CONFIG_NAME, INDEX_NAME, SINGLE_FILE_NAME
from mlx_k2.weights.inventory import TensorSpec
from mlx_k2.weights.model_source import DraftHead, ModelSource
from mlx_k2.weights.safetensors_file import write_file


def draft_config_fields(target: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the config.json fields of a head for the model with the fields ``target``, with ``changes``."""
    copied = (
        *("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank"),
        *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rms_norm_eps", "rope_theta", "rope_scaling"),
    )
    return {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "kimi_k2",
        "num_hidden_layers": 1,
        **{name: target[name] for name in copied},
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
        **changes,
    }


def write_random_draft_head(
    folder: Path,
    config_fields: Mapping[str, Any],
    target: ModelConfig,
    seed: int,
    *,
    own: tuple[str, ...] = (LM_HEAD, EMBEDDING),
    fc_norms: bool = False,
    layer_prefix: str = "layers.0",
) -> None:
    """Write a head for ``target`` to ``folder``: config.json and model.safetensors. The same arguments, the same bytes.

    ``own`` are the tensors that it does not share with the target. With ``draft_vocab_size`` in the fields it drafts
    that many of the target's tokens, chosen at random.
    """
    config_json = msgspec.json.format(msgspec.json.encode(config_fields), indent=2)
    num_aux = len(config_fields["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
    names = [*own, *(f"fc_norm.{at}.weight" for at in range(num_aux) if fc_norms), f"{layer_prefix}.hidden_norm.weight"]
    specs = _specs(config_json, target, names)
    folder.mkdir(parents=True)
    (folder / CONFIG_NAME).write_bytes(config_json)
    write_file(folder / SINGLE_FILE_NAME, specs, lambda spec: _random_bytes(spec, target.vocab_size, seed))


def _specs(config_json: bytes, target: ModelConfig, names: list[str]) -> tuple[TensorSpec, ...]:
    """Return the tensors of a head that has at least ``names``."""
    fields = msgspec.json.decode(config_json)
    if fields.get("draft_vocab_size", target.vocab_size) < target.vocab_size:
        names = [*names, TARGET_IDS]
    weight_map = dict.fromkeys(names, SINGLE_FILE_NAME)
    head = DraftHead(source=ModelSource(path_or_repo="random"))
    files = {CONFIG_NAME: config_json, INDEX_NAME: msgspec.json.encode({"weight_map": weight_map})}
    return describe_draft(files, head, target, check_names=False).specs()


def _random_bytes(spec: TensorSpec, vocab_size: int, seed: int) -> Iterator[bytes]:
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(spec.name.encode())]))
    if spec.name == TARGET_IDS:
        chosen = np.sort(generator.choice(vocab_size, spec.shape[0], replace=False))
        yield (chosen - np.arange(spec.shape[0])).astype("<i8").tobytes()
    elif len(spec.shape) == 1:
        yield bf16_bytes(generator.uniform(0.5, 1.5, spec.shape[0]).astype(np.float32))
    else:
        deviation = (3.0 if spec.name == LM_HEAD else 1.2) / spec.shape[1] ** 0.5 if spec.name != EMBEDDING else 1.0
        yield bf16_bytes(generator.standard_normal(spec.shape, np.float32).ravel() * np.float32(deviation))
