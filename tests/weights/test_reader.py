"""Tests of the reader of tensors: each stage gets exactly its tensors, unchanged; wrong files are refused."""

import errno
import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_k2.config import ModelConfig
from mlx_k2.errors import CheckpointError
from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import as_kimi_k25, tiny_config_fields
from mlx_k2.weights import reader
from mlx_k2.weights.index import CheckpointIndex, read_index_json
from mlx_k2.weights.inventory import bf16_spec, held_bytes, layer_specs, model_specs
from mlx_k2.weights.reader import LoadedTensors, ShardReader
from mlx_k2.weights.safetensors_file import read_header, write_file
from tests.weights.tiny_checkpoints import VOCAB_SIZE, config_of, write_tiny

NUM_LAYERS = 7
LAYER_2_FILE = "model-00003-of-000008.safetensors"


def open_reader(folder: Path, config: ModelConfig, dtype: mx.Dtype = mx.bfloat16) -> ShardReader:
    index = CheckpointIndex.from_json(read_index_json(folder), str(folder))
    return ShardReader(config, {name: folder / file for name, file in index.weight_map.items()}, dtype)


def replace_tensor(folder: Path, name: str, value: mx.array) -> None:
    """Replace the tensor ``name`` of a checkpoint by ``value``."""
    index = CheckpointIndex.from_json(read_index_json(folder), str(folder))
    path = folder / index.weight_map[name]
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    mx.eval(tensors)  # mx.load reads a tensor when it is evaluated, and the file is replaced now
    mx.save_safetensors(str(path), {**tensors, name: value})


def assert_equal(loaded: LoadedTensors, expected: LoadedTensors) -> None:
    assert loaded.tensors.keys() == expected.tensors.keys()
    assert all(mx.array_equal(loaded.tensors[name], expected.tensors[name]) for name in expected.tensors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader") / "model"
    write_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> ModelConfig:
    return ModelConfig.from_json((folder / "config.json").read_bytes(), "config.json")


def read_shard(shard_reader: ShardReader, config: ModelConfig, layers: range) -> list[LoadedTensors]:
    """Read the tensors of a stage that has ``layers``, and embedding or head if it is the first or last stage."""
    pieces = [shard_reader.embedding()] if layers.start == 0 else []
    pieces += [shard_reader.layer(layer) for layer in layers]
    return [*pieces, shard_reader.head()] if layers.stop == config.num_hidden_layers else pieces


@pytest.mark.parametrize("bounds", [(0, 7), (0, 4, 7), (0, 2, 5, 7)])
@pytest.mark.parametrize("family", ["kimi_k2", "kimi_k25"])
def test_the_stages_together_read_each_tensor_of_the_model_once(
    tmp_path: Path, bounds: tuple[int, ...], family: str
) -> None:
    fields = tiny_config_fields(VOCAB_SIZE)
    fields = as_kimi_k25(fields) if family == "kimi_k25" else fields
    write_random_checkpoint(tmp_path / "model", fields, seed=0, tokenizer_files={})
    config = ModelConfig.from_json((tmp_path / "model" / "config.json").read_bytes(), "config.json")
    shard_reader = open_reader(tmp_path / "model", config)
    names = [
        name
        for first, end in itertools.pairwise(bounds)
        for piece in read_shard(shard_reader, config, range(first, end))
        for name in piece.tensor_names
    ]
    assert sorted(names) == sorted(spec.name for spec in model_specs(config))


def test_tensors_equal_the_files_and_experts_are_stacked_in_order(folder: Path, config: ModelConfig) -> None:
    stored = mx.load(str(folder / LAYER_2_FILE))
    assert isinstance(stored, dict)
    tensors = open_reader(folder, config).layer(2).tensors
    prefix = "model.layers.2."
    for name in ("input_layernorm.weight", "self_attn.kv_b_proj.weight", "mlp.gate.e_score_correction_bias"):
        assert tensors[name].dtype == stored[prefix + name].dtype
        assert mx.array_equal(tensors[name], stored[prefix + name])
    for projection in ("gate_proj", "up_proj", "down_proj"):
        for expert in range(config.n_routed_experts):
            name = f"{prefix}mlp.experts.{expert}.{projection}"
            packed = tensors[f"mlp.experts.{projection}.weight_packed"]
            scale = tensors[f"mlp.experts.{projection}.weight_scale"]
            assert packed.dtype == mx.uint32
            assert scale.dtype == mx.bfloat16
            assert np.array_equal(packed[expert], stored[f"{name}.weight_packed"].view(mx.uint32))
            assert mx.array_equal(scale[expert], stored[f"{name}.weight_scale"])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_routed_experts_use_4_5_bits_per_weight_in_any_compute_dtype(
    folder: Path, config: ModelConfig, dtype: mx.Dtype
) -> None:
    tensors = open_reader(folder, config, dtype).layer(1).tensors
    num_weights = config.n_routed_experts * 3 * config.hidden_size * config.moe_intermediate_size
    num_bytes = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    assert num_bytes * 8 == num_weights * 4.5
    assert tensors["self_attn.o_proj.weight"].dtype == dtype
    assert tensors["mlp.gate.e_score_correction_bias"].dtype == mx.float32


def test_the_held_bytes_of_a_layer_in_bfloat16_equal_the_inventory(folder: Path, config: ModelConfig) -> None:
    shard_reader = open_reader(folder, config)
    for layer in range(NUM_LAYERS):
        num_bytes = sum(tensor.nbytes for tensor in shard_reader.layer(layer).tensors.values())
        assert num_bytes == held_bytes(layer_specs(config, layer))


def test_a_checkpoint_of_one_file_gives_the_same_tensors(tmp_path: Path, folder: Path, config: ModelConfig) -> None:
    joined: dict[str, mx.array] = {}
    for path in folder.glob("*.safetensors"):
        stored = mx.load(str(path))
        assert isinstance(stored, dict)
        joined |= stored
    mx.save_safetensors(str(tmp_path / "model.safetensors"), joined)
    assert_equal(open_reader(tmp_path, config).layer(3), open_reader(folder, config).layer(3))


WEIGHT_SHAPE = "model.layers.4.mlp.experts.9.down_proj.weight_shape"


def test_a_weight_shape_that_contradicts_the_config_is_refused_by_name(tmp_path: Path) -> None:
    config = write_tiny(tmp_path / "model")
    replace_tensor(tmp_path / "model", WEIGHT_SHAPE, mx.array([64, 128], mx.int32))
    with pytest.raises(CheckpointError, match=rf"{WEIGHT_SHAPE} says \[64, 128\], the config says \[128, 64\]"):
        open_reader(tmp_path / "model", config).layer(4)


def test_weight_shapes_may_be_int64(tmp_path: Path, folder: Path) -> None:
    config = write_tiny(tmp_path / "model")
    replace_tensor(tmp_path / "model", WEIGHT_SHAPE, mx.array([128, 64], mx.int64))
    assert_equal(open_reader(tmp_path / "model", config).layer(4), open_reader(folder, config).layer(4))


def test_each_byte_of_a_layers_tensors_is_read_once(
    folder: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[tuple[int, int]] = []
    system_read = os.preadv

    def read_and_record(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = system_read(descriptor, buffers, offset)
        ranges.append((offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", read_and_record)
    open_reader(folder, config).layer(2)
    header = read_header(folder / LAYER_2_FILE)
    needed = [header.tensors[spec.name].data_offsets for spec in layer_specs(config, 2)]
    assert sorted(ranges) == sorted((header.data_start + first, header.data_start + end) for first, end in needed)


def test_small_pieces_and_reads_that_return_fewer_bytes_give_the_same_tensors(
    folder: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_reader(folder, config).layer(2)
    system_read = os.preadv
    monkeypatch.setattr(reader, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: system_read(file, [buffers[0][:77]], offset))
    assert_equal(open_reader(folder, config).layer(2), expected)


def test_a_file_that_changes_after_it_was_checked_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_tiny(tmp_path / "model")
    path = tmp_path / "model" / LAYER_2_FILE
    shard_reader = open_reader(tmp_path / "model", config)
    shard_reader.layer(2)  # reads the header, too
    with monkeypatch.context() as patch:  # the file becomes shorter while it is read
        patch.setattr(shard_reader, "_check_headers", lambda _: os.truncate(path, path.stat().st_size // 2))
        with pytest.raises(CheckpointError, match=rf"{path} is truncated: it ends at byte \d+ within model\.layers\.2"):
            shard_reader.layer(2)
    with pytest.raises(CheckpointError, match=rf"{path} is truncated: \d+ of its \d+ bytes are missing"):
        shard_reader.layer(2)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path} is missing"):
        shard_reader.layer(2)


def test_nothing_is_computed_while_a_slow_disk_is_read(
    folder: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_reads = 0
    lock = threading.Lock()
    reads_while_computing: list[int] = []
    system_read, evaluate = os.preadv, mx.eval

    def read_slowly(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal num_reads
        with lock:
            num_reads += 1
        time.sleep(0.0005)
        count = system_read(descriptor, buffers, offset)
        with lock:
            num_reads -= 1
        return count

    def evaluate_and_record(*arrays: Any) -> None:
        reads_while_computing.append(num_reads)
        evaluate(*arrays)

    monkeypatch.setattr(os, "preadv", read_slowly)
    monkeypatch.setattr(mx, "eval", evaluate_and_record)
    monkeypatch.setattr(mx, "load", lambda *_: pytest.fail("mx.load reads while a graph is evaluated"))
    monkeypatch.setattr(mx, "async_eval", lambda *_: pytest.fail("nothing may run while the next bytes are read"))
    open_reader(folder, config).layer(2)
    assert len(reads_while_computing) > 3  # mx.eval was called between the reads, too
    assert set(reads_while_computing) == {0}


def test_nan_in_a_tensor_of_a_draft_head_for_kimi_k25_is_refused_by_name(tmp_path: Path) -> None:
    """A head's tensors lack the prefix that the tensors of Kimi K2.5 have."""
    path, spec = tmp_path / "head.safetensors", bf16_spec("fc.weight", 8)
    write_file(path, [spec], lambda _: [b"\xc0\x7f" * 8])
    config = config_of(as_kimi_k25(tiny_config_fields(VOCAB_SIZE)))
    with pytest.raises(CheckpointError, match=r"fc\.weight has NaN or infinity"):
        ShardReader(config, {spec.name: path}, mx.bfloat16, check_all=True).read((spec,))


@pytest.mark.parametrize("name", ["self_attn.o_proj.weight", "mlp.experts.3.up_proj.weight_packed"])
def test_the_error_of_a_failed_read_names_the_tensor(
    folder: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    header = read_header(folder / LAYER_2_FILE)
    broken_offset = header.data_start + header.tensors[f"model.layers.2.{name}"].data_offsets[0]
    system_read = os.preadv

    def read_or_fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset == broken_offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return system_read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", read_or_fail)
    with pytest.raises(CheckpointError, match=rf"model\.layers\.2\.{name}: Input/output error"):
        open_reader(folder, config).layer(2)
