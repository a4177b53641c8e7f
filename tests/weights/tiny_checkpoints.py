"""Tiny random checkpoints for tests."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_k2.config import ModelConfig
from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import tiny_config_fields

VOCAB_SIZE = 512


def config_of(fields: Mapping[str, Any]) -> ModelConfig:
    """Return the model config of a config.json with ``fields``."""
    return ModelConfig.from_json(json.dumps(fields).encode(), "config.json")


def write_tiny(folder: Path, seed: int = 0, **changes: Any) -> ModelConfig:
    """Write a tiny checkpoint into ``folder``, with ``changes`` of its config.json; return its model config."""
    fields = tiny_config_fields(VOCAB_SIZE, **changes)
    write_random_checkpoint(folder, fields, seed, {"tiktoken.model": b"aGVsbG8= 0\n"})
    return config_of(fields)
