"""Tests of random checkpoints: their files have the layout of Kimi K2's, and are written all or none."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from mlx_k2.config import ModelConfig
from mlx_k2.errors import ConfigError
from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import as_kimi_k25, tiny_config_fields
from mlx_k2.weights.inventory import model_specs
from mlx_k2.weights.safetensors_file import read_header
from tests.weights.tiny_checkpoints import VOCAB_SIZE, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random checkpoint."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> ModelConfig:
    return ModelConfig.from_json((folder / "config.json").read_bytes(), "config.json")


def test_there_is_a_file_for_each_layer_and_one_for_embedding_and_head(folder: Path) -> None:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-000008.safetensors" for number in range(1, 9)]
    assert all(name.startswith("model.layers.3.") for name in read_header(folder / files[3]).tensors)
    last_names = read_header(folder / files[-1]).tensors.keys()
    assert last_names == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_the_index_lists_every_tensor_and_the_total_size(folder: Path, config: ModelConfig) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    tensors_by_file = {path.name: read_header(path).tensors for path in folder.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in tensors_by_file.items() for name in tensors}
    total_bytes = sum(tensor.num_bytes for tensors in tensors_by_file.values() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total_bytes
    unneeded_names = index["weight_map"].keys() - {spec.name for spec in model_specs(config)}
    assert unneeded_names == {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(7)}


def test_the_safetensors_library_reads_the_same_shapes_and_dtypes(folder: Path, config: ModelConfig) -> None:
    layouts = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                tensor = file.get_slice(name)
                layouts[name] = (tensor.get_dtype(), tensor.get_shape())
    for spec in model_specs(config):
        assert layouts[spec.name] == (spec.dtype, list(spec.shape))


def test_shapes_are_recorded_and_the_correction_bias_is_float32(folder: Path) -> None:
    with safe_open(folder / "model-00002-of-000008.safetensors", "numpy") as file:
        bias = file.get_tensor("model.layers.1.mlp.gate.e_score_correction_bias")
        assert bias.dtype == np.float32
        assert 0.05 < np.abs(bias).max() < 1  # the standard deviation is 0.2
        assert file.get_tensor("model.layers.1.mlp.experts.2.down_proj.weight_shape").tolist() == [128, 64]
        assert file.get_tensor("model.layers.1.mlp.experts.2.up_proj.weight_shape").tolist() == [64, 128]


def test_packed_codes_use_all_sixteen_values_and_have_mean_zero(folder: Path) -> None:
    with safe_open(folder / "model-00002-of-000008.safetensors", "numpy") as file:
        names = [name for name in file.keys() if name.endswith("weight_packed")]  # noqa: SIM118 - not a dictionary
        words = np.concatenate([file.get_tensor(name).ravel() for name in names])
    codes = np.concatenate([(words.view(np.uint32) >> shift & 15).astype(int) - 8 for shift in range(0, 32, 4)])
    assert set(codes.tolist()) == set(range(-8, 8))
    assert abs(codes.mean()) < 0.1


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("first", 7), ("second", 7), ("third", 8)):
        write_tiny(tmp_path / name, seed)
    first, second, third = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second", "third")
    )
    assert first == second
    assert all(first[name] != third[name] for name in first if name.endswith(".safetensors"))


def test_tokenizer_files_are_written_unchanged_and_no_temporary_folder_remains(folder: Path) -> None:
    assert (folder / "tiktoken.model").read_bytes() == b"aGVsbG8= 0\n"  # as write_tiny gives it
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_kimi_k25_has_prefixed_names_and_a_vision_tower(tmp_path: Path) -> None:
    fields = as_kimi_k25(tiny_config_fields(VOCAB_SIZE))
    write_random_checkpoint(tmp_path / "model", fields, seed=0, tokenizer_files={})
    names = set(json.loads((tmp_path / "model/model.safetensors.index.json").read_bytes())["weight_map"])
    assert {name.split(".")[0] for name in names} == {"language_model", "vision_tower", "mm_projector"}
    config = ModelConfig.from_json((tmp_path / "model/config.json").read_bytes(), "config.json")
    assert {spec.name for spec in model_specs(config)} <= names


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    first_file = tmp_path / "model" / "model-00001-of-000008.safetensors"
    write_tiny(tmp_path / "model", seed=1)
    data = first_file.read_bytes()
    write_tiny(tmp_path / "model", seed=2)
    assert first_file.read_bytes() == data


def test_two_concurrent_writers_produce_one_complete_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: write_tiny(tmp_path / "model", seed=3), range(2)))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 8


def test_unsupported_config_fields_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    fields = tiny_config_fields(VOCAB_SIZE, scoring_func="softmax")
    with pytest.raises(ConfigError, match="scoring_func"):
        write_random_checkpoint(tmp_path / "model", fields, seed=0, tokenizer_files={})
    assert list(tmp_path.iterdir()) == []
