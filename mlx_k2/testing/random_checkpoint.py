"""A writer of random checkpoints in the layout of Kimi K2's original ones, for tests and benchmarks.

The values are scaled so that every part of the model affects its output: the output of each block has about the
magnitude of the residual stream, attention depends on positions, and tokens are routed to different experts.
"""

import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mlx_k2.config import Family, ModelConfig
from mlx_k2.weights.inventory import INT4_GROUP_SIZE, TensorSpec, embedding_specs, head_specs, layer_specs
from mlx_k2.weights.safetensors_file import write_file

_MAX_PIECE_VALUES = 1 << 22  # values in memory at once, of a large tensor
_CODE_DEVIATION = 4.2  # standard deviation of the INT4 codes that _codes returns

# Root mean square of a matrix's output for an input of root mean square 1, by the ending of the matrix's name.
_GAINS: Mapping[str, float] = {
    "self_attn.q_a_proj.weight": 1.0,
    "self_attn.q_b_proj.weight": 1.2,
    "self_attn.q_proj.weight": 1.2,
    "self_attn.kv_a_proj_with_mqa.weight": 1.2,
    "self_attn.kv_b_proj.weight": 1.2,
    "self_attn.o_proj.weight": 1.8,
    "mlp.gate.weight": 1.5,
    "gate_proj.weight": 1.2,
    "up_proj.weight": 1.2,
    "down_proj.weight": 1.2,
    "lm_head.weight": 3.0,
}


def write_random_checkpoint(
    folder: Path, config_fields: Mapping[str, Any], seed: int, tokenizer_files: Mapping[str, bytes]
) -> None:
    """Write a checkpoint with the config ``config_fields`` and the ``tokenizer_files``, by name, to ``folder``.

    The weights are in one file per layer, one for embedding and head, and for K2.5 one for the image encoder. The same
    arguments give the same bytes. ``folder`` appears only when it is complete; an existing folder is kept.

    Raises:
        ConfigError: the fields are not those of a model that this program runs.
    """
    config_json = msgspec.json.format(msgspec.json.encode(config_fields), indent=2)
    config = ModelConfig.from_json(config_json, "config_fields")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        _write_tensors(partial, config, seed)
        for name, data in {"config.json": config_json, **tokenizer_files}.items():
            (partial / name).write_bytes(data)
        _rename_unless_there(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rename_unless_there(partial: Path, folder: Path) -> None:
    if folder.exists():
        return
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():  # else another process completed it first
            raise


def _write_tensors(folder: Path, config: ModelConfig, seed: int) -> None:
    specs_of_files = _specs_of_files(config)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, specs in enumerate(specs_of_files, start=1):
        name = f"model-{number:05d}-of-{len(specs_of_files):06d}.safetensors"
        total_bytes += write_file(folder / name, specs, lambda spec: _random_bytes(spec, config, seed))
        weight_map |= {spec.name: name for spec in specs}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    index_json = msgspec.json.format(msgspec.json.encode(index), indent=2)
    (folder / "model.safetensors.index.json").write_bytes(index_json)


def _specs_of_files(config: ModelConfig) -> list[tuple[TensorSpec, ...]]:
    """Return the specs of each file's tensors. As in original checkpoints, some of the tensors are never read."""
    frequencies = (config.qk_rope_head_dim // 2,)
    files = []
    for layer in range(config.num_hidden_layers):
        specs = layer_specs(config, layer)
        if config.family is Family.KIMI_K2:
            specs += (TensorSpec(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", "F32", frequencies),)
        files.append(specs)
    files.append(embedding_specs(config) + head_specs(config))
    if config.family is Family.KIMI_K25:
        files.append(
            (
                TensorSpec("vision_tower.patch_embed.proj.weight", "BF16", (16, 3, 14, 14)),
                TensorSpec("mm_projector.proj.0.weight", "BF16", (16, 16)),
            )
        )
    return files


def _random_bytes(spec: TensorSpec, config: ModelConfig, seed: int) -> Iterator[bytes]:
    """Yield the tensor's bytes in pieces. They are sampled with (seed, name) as seed: no other tensor affects them."""
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(spec.name.encode())]))
    count = spec.num_bytes // 2  # of values, if they are bfloat16
    if spec.name.endswith("weight_shape"):
        shape = (config.moe_intermediate_size, config.hidden_size)
        yield np.array(shape[::-1] if ".down_proj." in spec.name else shape, np.int32).tobytes()
    elif spec.name.endswith("weight_packed"):
        yield _codes(generator, spec.shape).tobytes()
    elif spec.name.endswith("weight_scale"):
        projection = spec.name.removesuffix("_scale")
        scale = _gain(projection) / _CODE_DEVIATION / (spec.shape[1] * INT4_GROUP_SIZE) ** 0.5
        yield bf16_bytes(generator.uniform(0.5 * scale, 1.5 * scale, count).astype(np.float32))
    elif spec.name.endswith("e_score_correction_bias"):
        yield generator.normal(0.0, 0.2, spec.shape).astype("<f4").tobytes()
    elif spec.dtype == "F32":
        yield generator.random(spec.shape, np.float32).tobytes()
    elif len(spec.shape) == 1:
        yield bf16_bytes(generator.uniform(0.5, 1.5, count).astype(np.float32))
    else:
        deviation = 1.0 if "embed_tokens" in spec.name else _gain(spec.name) / spec.shape[-1] ** 0.5
        for first in range(0, count, _MAX_PIECE_VALUES):
            values = generator.standard_normal(min(_MAX_PIECE_VALUES, count - first), np.float32)
            yield bf16_bytes(values * np.float32(deviation))


def _gain(name: str) -> float:
    return next((gain for ending, gain in _GAINS.items() if name.endswith(ending)), 1.0)


def _codes(generator: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.uint32]:
    """Return random words of eight INT4 codes.

    In all columns but the first, 0 replaces -8: the mean of the codes is near 0, and yet all 16 codes occur.
    """
    words = generator.integers(0, 1 << 32, shape, np.uint32)
    others = words[:, 1:]
    # Codes are stored plus 8: -8 has four zero bits, and 0 has only the highest bit set.
    is_not_minus_8 = (others | others >> 1 | others >> 2 | others >> 3) & 0x11111111
    others |= (is_not_minus_8 ^ 0x11111111) << 3
    return words


def bf16_bytes(values: NDArray[np.float32]) -> bytes:
    """Return the bytes of float32 values rounded to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2").tobytes()
