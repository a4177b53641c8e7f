"""Tests of memory while loading: at most the stage's own tensors, its largest layer, and 200 MB."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import tiny_config_fields
from mlx_k2.weights.inventory import held_bytes, layer_specs
from tests.model.checkpoints import read_config
from tests.stage.measure_loading import LoadingMemory

ALLOWANCE_BYTES = 200 * 10**6
NUM_LAYERS = 12
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a checkpoint whose layers are together much larger than a process without a model."""
    folder = tmp_path_factory.mktemp("large") / "model"
    shape = {"hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 64, "num_hidden_layers": NUM_LAYERS}
    write_random_checkpoint(folder, tiny_config_fields(vocab_size=512, **shape), seed=0, tokenizer_files={})
    return folder


def measure(folder: Path, *arguments: int) -> LoadingMemory:
    """Run measure_loading with arguments FIRST_LAYER END_LAYER [DENSE_BITS]."""
    command = [sys.executable, "-m", "tests.stage.measure_loading", str(folder), *map(str, arguments)]
    completed = subprocess.run(command, capture_output=True, cwd=ROOT)
    assert completed.returncode == 0, completed.stderr
    return msgspec.json.decode(completed.stdout, type=LoadingMemory)


@pytest.mark.slow
@pytest.mark.parametrize("first_layer", [0, NUM_LAYERS // 2])
def test_peak_memory_while_loading_is_at_most_shard_plus_largest_layer_plus_200_mb(
    folder: Path, first_layer: int
) -> None:
    memory = measure(folder, first_layer, NUM_LAYERS)
    held = sum(memory.pieces)
    assert memory.held == pytest.approx(held, rel=0.01)
    bound = held + max(memory.pieces) + ALLOWANCE_BYTES
    assert 2 * held > bound  # a second copy of the stage would be above the bound
    assert memory.peak <= bound
    assert memory.peak_resident <= bound


@pytest.mark.slow
def test_quantizing_while_loading_needs_at_most_one_unquantized_layer_of_extra_memory(folder: Path) -> None:
    config = read_config(folder)
    memory = measure(folder, 0, NUM_LAYERS, 8)
    held = sum(memory.pieces)
    assert memory.held == pytest.approx(held, rel=0.01)
    unquantized = [held_bytes(layer_specs(config, layer), compute_bytes=4) for layer in range(NUM_LAYERS)]
    assert memory.peak <= held + max(unquantized)
    assert memory.peak_resident <= held + max(unquantized) + ALLOWANCE_BYTES
