"""Tests of bench.cuda_run, the script for an NVIDIA GPU, as far as a machine without one can run it."""

import subprocess
import sys

import mlx.core as mx
import pytest

from bench import cuda_run
from bench.kernels import HEADER
from bench.measure import ROOT
from mlx_k2.kernels import experts, reference
from mlx_k2.kernels.layer_time import Layer
from mlx_k2.kernels.self_check import LayerShape
from mlx_k2.kernels.tuning import Tuning

pytestmark = pytest.mark.timeout(60)


def test_all_parts_together_end_in_less_than_8_minutes() -> None:
    assert sum(cuda_run.PART_TIMEOUTS_S.values()) < 480


@pytest.mark.skipif(mx.cuda.is_available(), reason="needs no CUDA back end: run without an NVIDIA GPU")
def test_without_cuda_the_script_reports_it_and_measures_nothing() -> None:
    result = subprocess.run([sys.executable, "-m", "bench.cuda_run"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert "MLX has no CUDA back end on this machine" in result.stdout


def test_each_number_of_tokens_has_a_row_with_its_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reference_layer(_tokens: int, _tuning: Tuning) -> Layer:
        return reference.routed_experts

    shape = LayerShape(hidden_size=64, intermediate_size=32, top_k=4, dtype=mx.float32, num_experts=16)
    monkeypatch.setattr(cuda_run, "SHAPE", shape)
    monkeypatch.setattr(cuda_run, "NUM_EXPERTS", shape.num_experts)
    monkeypatch.setattr(cuda_run, "TOP_K", shape.top_k)
    monkeypatch.setattr(cuda_run, "COPY_BYTES", 2**20)
    monkeypatch.setattr(experts, "layer_of", reference_layer)
    rows = list(cuda_run.speed_rows())
    assert {len(row) for row in rows} == {len(HEADER)}
    assert [row[HEADER.index("tokens")] for row in rows] == list(cuda_run.TOKENS)
    assert rows[0][HEADER.index("experts chosen")] == shape.top_k
    assert "of a copy's" in capsys.readouterr().out


def test_two_stages_give_the_answer_that_is_expected_of_a_gpu() -> None:
    assert cuda_run.stages()
