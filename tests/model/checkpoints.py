"""Random checkpoints of every variant of the model family, written once and shared. Computes nothing."""

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


def make_checkpoints(folder: Path) -> Checkpoint:
    """Return the function variant's name -> its folder. It writes the checkpoint at the first call."""

    def checkpoint(variant: str) -> Path:
        made = folder / variant.replace(" ", "-")
        if not made.exists():
            write_random_checkpoint(made, VARIANTS[variant], 0, {})
        return made

    return checkpoint


def read_config(folder: Path) -> ModelConfig:
    """Return the config of the checkpoint in ``folder``."""
    return ModelConfig.from_json((folder / "config.json").read_bytes(), str(folder / "config.json"))


def planted(folder: Path, copy: Path, name: str, value: int, *, first: bool = False) -> Path:
    """Return a copy of a checkpoint with ``value`` as the last element of tensor ``name``, or as its first one.

    ``value`` is a bfloat16, or the upper half of a float32. Other files are links.
    """
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    path = copy / CheckpointIndex.from_json(read_index_json(folder), str(folder)).weight_map[name]
    data = bytearray(path.read_bytes())
    header = read_header(path)
    tensor = header.tensors[name]
    end = header.data_start + (
        tensor.data_offsets[0] + {"BF16": 2, "F32": 4}[tensor.dtype] if first else tensor.data_offsets[1]
    )
    data[end - 2 : end] = value.to_bytes(2, "little")
    path.unlink()
    path.write_bytes(data)
    return copy
