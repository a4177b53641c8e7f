"""Tests of memory while loading: at most the stage's own tensors, its largest layer, and 200 MB."""

import json
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

import pytest

from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import tiny_config_fields
from mlx_k2.weights.inventory import held_bytes, layer_specs
from tests.model.checkpoints import read_config

ALLOWANCE_BYTES = 200 * 10**6
ROOT = Path(__file__).parents[2]


class Measured(TypedDict):
    """Output of measure_loading, in bytes."""

    pieces: list[int]
    held: int
    peak: int
    rss: int


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("large") / "model"
    shape = {"hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 64, "num_hidden_layers": 12}
    write_random_checkpoint(made, tiny_config_fields(512, **shape), 0, {})
    return made


def measure(folder: Path, *arguments: int) -> Measured:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.stage.measure_loading", str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stderr
    measured: Measured = json.loads(ran.stdout)
    return measured


@pytest.mark.slow
@pytest.mark.parametrize(("first_layer", "end_layer"), [(0, 12), (6, 12)])
def test_peak_memory_while_loading_is_at_most_shard_plus_largest_layer_plus_200_mb(
    folder: Path, first_layer: int, end_layer: int
) -> None:
    measured = measure(folder, first_layer, end_layer)
    held = sum(measured["pieces"])
    assert measured["held"] == pytest.approx(held, rel=0.01)
    bound = held + max(measured["pieces"]) + ALLOWANCE_BYTES
    assert 2 * held > bound  # a second copy of everything would fail
    assert measured["peak"] <= bound
    assert measured["rss"] <= bound


@pytest.mark.slow
def test_quantizing_while_loading_needs_at_most_one_unquantized_layer_of_extra_memory(folder: Path) -> None:
    config = read_config(folder)
    measured = measure(folder, 0, 12, 8)
    assert measured["held"] == pytest.approx(sum(measured["pieces"]), rel=0.01)
    largest_as_read = max(held_bytes(layer_specs(config, layer), 4) for layer in range(12))
    assert measured["peak"] <= sum(measured["pieces"]) + largest_as_read
    assert measured["rss"] <= sum(measured["pieces"]) + largest_as_read + ALLOWANCE_BYTES
