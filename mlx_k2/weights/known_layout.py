"""The config of moonshotai/Kimi-K2-Thinking, from a copy in this package, and the index that follows from it."""

from pathlib import Path
from typing import Any

import msgspec

from mlx_k2.config import ORIGINAL_REPO, ModelConfig
from mlx_k2.json_text.read import read_json
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.index import CONFIG_NAME, INDEX_NAME, CheckpointIndex, model_digest
from mlx_k2.weights.inventory import embedding_specs, head_specs, layer_specs
from mlx_k2.weights.model_source import ModelSource

_KIMI_K2_THINKING = Path(__file__).with_name("kimi_k2_thinking.json")


def thinking_config_fields(**changes: Any) -> dict[str, Any]:
    """Return the fields of Kimi K2 Thinking's config.json with ``changes``. A change to None is null in config.json."""
    fields = read_json(_KIMI_K2_THINKING.read_bytes(), dict[str, Any])
    unknown = changes.keys() - fields.keys()
    assert not unknown, f"not fields of a Kimi K2 config: {sorted(unknown)}"
    return fields | changes


def known_layout(source: ModelSource) -> ModelDescription | None:
    """Return the description of Kimi K2 Thinking, for a plan without a network; None for any other source.

    The description has no tokenizer files. Its digest differs from the digest of the Hub's files.
    """
    if source != ModelSource(path_or_repo=ORIGINAL_REPO):
        return None
    config_json = msgspec.json.encode(thinking_config_fields())
    config = ModelConfig.from_json(config_json, f"{ORIGINAL_REPO}/{CONFIG_NAME}")
    index = CheckpointIndex(_weight_map(config), f"{ORIGINAL_REPO}/{INDEX_NAME}")
    return ModelDescription({CONFIG_NAME: config_json}, config, index, model_digest(config_json, b""), None)


def _weight_map(config: ModelConfig) -> dict[str, str]:
    """Return the file of each tensor: one file for each layer, and a last one for embedding, norm and head."""
    num_files = config.num_hidden_layers + 1
    files = [layer_specs(config, layer) for layer in range(config.num_hidden_layers)]
    files.append((*embedding_specs(config), *head_specs(config)))
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(files, start=1):
        name = f"model-{number:05}-of-{num_files:06}.safetensors"
        weight_map |= dict.fromkeys((spec.name for spec in specs), name)
    return weight_map
