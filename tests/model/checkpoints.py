"""Random checkpoints of every variant of the model family, written once and shared."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_k2.config import ModelConfig
from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import as_kimi_k25, tiny_config_fields
from mlx_k2.weights.index import CheckpointIndex, read_index_json
from mlx_k2.weights.safetensors_file import read_header

VOCAB_SIZE = 512

YARN: Mapping[str, Any] = tiny_config_fields(VOCAB_SIZE)["rope_scaling"]

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "thinking": tiny_config_fields(VOCAB_SIZE),
    "k25": as_kimi_k25(tiny_config_fields(VOCAB_SIZE, rope_scaling={**YARN, "beta_fast": 32.0})),
    "direct query, groups": tiny_config_fields(VOCAB_SIZE, q_lora_rank=None, n_group=4, topk_group=2),
    "direct query, beta_fast 32": tiny_config_fields(
        VOCAB_SIZE, q_lora_rank=None, rope_scaling={**YARN, "beta_fast": 32.0}
    ),
    "groups, no shared expert": tiny_config_fields(VOCAB_SIZE, n_group=4, topk_group=3, n_shared_experts=0),
}

Checkpoint = Callable[[str], Path]
"""A function that returns the folder of a variant's checkpoint, by the variant's name."""


def make_checkpoints(folder: Path) -> Checkpoint:
    """Return the function that writes a variant's checkpoint below ``folder`` in the first call with the variant."""

    def checkpoint(variant: str) -> Path:
        variant_folder = folder / variant.replace(" ", "-")
        if not variant_folder.exists():
            write_random_checkpoint(variant_folder, VARIANTS[variant], seed=0, tokenizer_files={})
        return variant_folder

    return checkpoint


def read_config(folder: Path) -> ModelConfig:
    """Return the config of the checkpoint in ``folder``."""
    return ModelConfig.from_json((folder / "config.json").read_bytes(), str(folder / "config.json"))


def copy_with_value(folder: Path, copy: Path, name: str, value: int, *, first: bool = False) -> Path:
    """Write a copy of a checkpoint to ``copy``, with ``value`` as the last element of tensor ``name``; return ``copy``.

    With ``first`` it is the first element. ``value`` has the bits of a bfloat16, or of the upper half of a float32.
    Files without this tensor are links.
    """
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    path = copy / CheckpointIndex.from_json(read_index_json(folder), str(folder)).weight_map[name]
    data = bytearray(path.read_bytes())
    header = read_header(path)
    tensor = header.tensors[name]
    first_byte, end_byte = tensor.data_offsets
    end_of_element = first_byte + {"BF16": 2, "F32": 4}[tensor.dtype] if first else end_byte
    end = header.data_start + end_of_element
    data[end - 2 : end] = value.to_bytes(2, "little")
    path.unlink()
    path.write_bytes(data)
    return copy
