"""Tests of the measurements of `mlx-k2 kernels` on small shapes: with a GPU whose kernels fail, and without one."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_k2.config import ModelConfig
from mlx_k2.kernels import check_cache, experts
from mlx_k2.kernels.self_check import BATCH, DECODE, PREFILL, ROUTER, LayerShape
from mlx_k2.stage import measure_kernels
from mlx_k2.testing.tiny_config import tiny_config_fields
from tests.model.chain import like_a_stage_on_a_cpu

pytestmark = pytest.mark.timeout(60)

SHAPES_OF_K2 = measure_kernels._k2_config
SMALL = LayerShape(hidden_size=64, intermediate_size=32, top_k=4, dtype=mx.float32)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = ModelConfig.from_json(json.dumps(tiny_config_fields(256)).encode(), "tiny")
    monkeypatch.setattr(measure_kernels, "_k2_config", lambda: config)
    monkeypatch.setattr(measure_kernels, "SMALL_LAYER", SMALL)
    monkeypatch.setattr(measure_kernels, "on_gpu", lambda: False)
    monkeypatch.setattr(experts, "TIMED_TOKENS", {DECODE: 1, BATCH: 2, experts.SHORT: 20, experts.LONG: 30})
    monkeypatch.setattr(experts, "_adopted", {})
    monkeypatch.setattr(check_cache, "DEFAULT_DIRECTORY", tmp_path)


def test_without_a_gpu_only_the_reference_is_timed() -> None:
    with like_a_stage_on_a_cpu():
        report = measure_kernels.measure_report()
    assert (report.chip, report.kernels, report.sizes, report.read_gb_per_s) == (None, (), {}, None)
    assert report.plain_mlx_gb_per_s is not None
    assert report.plain_mlx_gb_per_s > 0


@pytest.mark.slow
def test_failed_kernels_are_listed_without_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_kernels, "on_gpu", lambda: True)
    monkeypatch.setattr(experts, "_backend_kernels", lambda: experts.METAL_KERNELS)
    with like_a_stage_on_a_cpu():
        report = measure_kernels.measure_report()
    assert report.chip is not None
    assert [(line.kernel, line.usable, line.gb_per_s) for line in report.kernels] == [
        (name, False, None) for name in (DECODE, BATCH, PREFILL, PREFILL, ROUTER)
    ]
    assert all("No Metal back-end" in line.reason for line in report.kernels)
    assert all(line.plain_mlx_gb_per_s for line in report.kernels if line.kernel != ROUTER)
    assert report.sizes == {}


def test_the_check_measures_no_speed_and_reads_no_cached_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_kernels, "on_gpu", lambda: True)
    monkeypatch.setattr(experts, "_backend_kernels", lambda: experts.METAL_KERNELS)
    monkeypatch.setattr(check_cache, "load", lambda _: pytest.fail("the cache was read"))
    with like_a_stage_on_a_cpu():
        report = measure_kernels.check_report()
    assert [(line.kernel, line.ran, line.gb_per_s) for line in report.kernels] == [
        (name, False, None) for name in (DECODE, BATCH, PREFILL, ROUTER)
    ]


def test_a_tokens_feed_forward_blocks_are_timed() -> None:
    with like_a_stage_on_a_cpu():
        assert measure_kernels.measure_decode().seconds > 0


def test_k2_is_measured_with_all_its_experts_unless_the_machine_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory, experts_measured in ((None, 384), (400 * 10**9, 384), (6 * 10**9, 64)):
        monkeypatch.setattr(measure_kernels, "working_set_bytes", lambda memory=memory: memory)
        assert SHAPES_OF_K2().n_routed_experts == experts_measured


def test_idle_memory_is_read_again_after_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_kernels, "IDLE_S", 0.05)
    with like_a_stage_on_a_cpu():
        measured = measure_kernels.measure_idle()
    assert measured.held_bytes > 0
    assert min(measured.warm_seconds, measured.idle_seconds) > 0


def test_the_attention_of_a_chunk_is_timed_in_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_kernels, "CHUNK_TOKENS", 16)
    with like_a_stage_on_a_cpu():
        measured = measure_kernels.measure_attention()
    assert min(measured.fused_seconds, measured.unfused_seconds) > 0
