"""Tests of the reader: each stage gets exactly its tensors, unchanged, and a shape unlike the config's is refused."""

import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_k2.config import ModelConfig
from mlx_k2.errors import CheckpointError
from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import as_kimi_k25, tiny_config_fields
from mlx_k2.weights.index import CheckpointIndex, read_index_json
from mlx_k2.weights.inventory import held_bytes, layer_specs, model_specs
from mlx_k2.weights.reader import LoadedTensors, ShardReader
from tests.weights.made_up import VOCAB_SIZE, write_tiny

LAYERS = 7


def open_reader(folder: Path, config: ModelConfig, dtype: mx.Dtype = mx.bfloat16) -> ShardReader:
    index = CheckpointIndex.from_json(read_index_json(folder), str(folder))
    return ShardReader(config, {name: folder / file for name, file in index.weight_map.items()}, dtype)


def rewrite(folder: Path, name: str, value: mx.array) -> None:
    """Replace the tensor ``name`` by ``value``."""
    index = CheckpointIndex.from_json(read_index_json(folder), str(folder))
    path = folder / index.weight_map[name]
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    mx.save_safetensors(str(path), {**tensors, name: value})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reader") / "model"
    write_tiny(made)
    return made


@pytest.fixture(scope="module")
def config(folder: Path) -> ModelConfig:
    return ModelConfig.from_json((folder / "config.json").read_bytes(), "config.json")


def shard(reader: ShardReader, config: ModelConfig, layers: range) -> list[LoadedTensors]:
    pieces = [reader.embedding()] if layers.start == 0 else []
    pieces += [reader.layer(layer) for layer in layers]
    return [*pieces, reader.head()] if layers.stop == config.num_hidden_layers else pieces


@pytest.mark.parametrize("bounds", [(0, 7), (0, 4, 7), (0, 2, 5, 7)])
@pytest.mark.parametrize("family", ["kimi_k2", "kimi_k25"])
def test_the_stages_together_read_each_tensor_of_the_model_once(
    tmp_path: Path, bounds: tuple[int, ...], family: str
) -> None:
    fields = tiny_config_fields(VOCAB_SIZE)
    fields = as_kimi_k25(fields) if family == "kimi_k25" else fields
    write_random_checkpoint(tmp_path / "model", fields, 0, {})
    config = ModelConfig.from_json((tmp_path / "model" / "config.json").read_bytes(), "config.json")
    reader = open_reader(tmp_path / "model", config)
    names = [
        name
        for first, end in itertools.pairwise(bounds)
        for piece in shard(reader, config, range(first, end))
        for name in piece.tensor_names
    ]
    assert sorted(names) == sorted(spec.name for spec in model_specs(config))


def test_tensors_equal_the_files_and_experts_are_stacked_in_order(folder: Path, config: ModelConfig) -> None:
    stored = mx.load(str(folder / "model-00003-of-000008.safetensors"))
    assert isinstance(stored, dict)
    tensors = open_reader(folder, config).layer(2).tensors
    prefix = "model.layers.2."
    for name in ("input_layernorm.weight", "self_attn.kv_b_proj.weight", "mlp.gate.e_score_correction_bias"):
        assert tensors[name].dtype == stored[prefix + name].dtype
        assert mx.array_equal(tensors[name], stored[prefix + name])
    for projection in ("gate_proj", "up_proj", "down_proj"):
        for expert in range(16):
            one = f"{prefix}mlp.experts.{expert}.{projection}"
            packed = tensors[f"mlp.experts.{projection}.weight_packed"]
            scale = tensors[f"mlp.experts.{projection}.weight_scale"]
            assert packed.dtype == mx.uint32
            assert scale.dtype == mx.bfloat16
            assert np.array_equal(packed[expert], stored[f"{one}.weight_packed"].view(mx.uint32))
            assert mx.array_equal(scale[expert], stored[f"{one}.weight_scale"])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_routed_experts_use_4_5_bits_per_weight_in_any_compute_dtype(
    folder: Path, config: ModelConfig, dtype: mx.Dtype
) -> None:
    tensors = open_reader(folder, config, dtype).layer(1).tensors
    num_weights = 16 * 3 * config.hidden_size * config.moe_intermediate_size
    routed = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    assert routed * 8 == num_weights * 4.5
    assert tensors["self_attn.o_proj.weight"].dtype == dtype
    assert tensors["mlp.gate.e_score_correction_bias"].dtype == mx.float32


def test_the_held_bytes_of_a_layer_in_bfloat16_equal_the_inventory(folder: Path, config: ModelConfig) -> None:
    reader = open_reader(folder, config)
    for layer in range(LAYERS):
        assert reader.layer(layer).held_bytes == held_bytes(layer_specs(config, layer))


def test_a_single_file_checkpoint_gives_the_same_tensors(tmp_path: Path, folder: Path, config: ModelConfig) -> None:
    joined: dict[str, mx.array] = {}
    for path in folder.glob("*.safetensors"):
        stored = mx.load(str(path))
        assert isinstance(stored, dict)
        joined |= stored
    mx.save_safetensors(str(tmp_path / "model.safetensors"), joined)
    expected, found = (open_reader(position, config).layer(3).tensors for position in (folder, tmp_path))
    assert expected.keys() == found.keys()
    assert all(mx.array_equal(expected[name], found[name]) for name in expected)


SHAPE_NAME = "model.layers.4.mlp.experts.9.down_proj.weight_shape"


def test_a_weight_shape_that_contradicts_the_config_is_refused_by_name(tmp_path: Path) -> None:
    config = write_tiny(tmp_path / "model")
    rewrite(tmp_path / "model", SHAPE_NAME, mx.array([64, 128], mx.int32))
    with pytest.raises(CheckpointError, match=rf"{SHAPE_NAME} says \[64, 128\], the config says \[128, 64\]"):
        open_reader(tmp_path / "model", config).layer(4)


def test_weight_shapes_may_be_int64(tmp_path: Path, folder: Path) -> None:
    config = write_tiny(tmp_path / "model")
    rewrite(tmp_path / "model", SHAPE_NAME, mx.array([128, 64], mx.int64))
    found, expected = (open_reader(position, config).layer(4).tensors for position in (tmp_path / "model", folder))
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)
