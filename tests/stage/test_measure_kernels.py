"""Tests of the measurements of `mlx-k2 kernels` on small shapes: without a GPU, and with a GPU whose kernels fail."""

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

K2_CONFIG = measure_kernels._k2_config
"""The function that `small_shapes` replaces."""
SMALL = LayerShape(hidden_size=64, intermediate_size=32, top_k=4, dtype=mx.float32)


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measure small shapes on a machine without a GPU, with an empty cache of checks."""
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
def test_kernels_that_fail_are_reported_without_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_kernels, "on_gpu", lambda: True)
    monkeypatch.setattr(experts, "_backend_kernels", lambda: experts.METAL_KERNELS)
    with like_a_stage_on_a_cpu():
        report = measure_kernels.measure_report()
    assert report.chip is not None
    assert [(line.kernel, line.usable, line.gb_per_s) for line in report.kernels] == [
        (name, False, None)
        for name in (DECODE, BATCH, PREFILL, PREFILL, ROUTER)  # prefill: short and long chunks
    ]
    assert all("No Metal back-end" in line.reason for line in report.kernels)
    assert all(line.plain_mlx_gb_per_s for line in report.kernels if line.kernel != ROUTER)
    assert report.sizes == {}


def test_check_report_measures_no_speed_and_reads_no_cached_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_kernels, "on_gpu", lambda: True)
    monkeypatch.setattr(experts, "_backend_kernels", lambda: experts.METAL_KERNELS)
    monkeypatch.setattr(check_cache, "load", lambda _: pytest.fail("the cache was read"))
    with like_a_stage_on_a_cpu():
        report = measure_kernels.check_report()
    assert [(line.kernel, line.ran, line.gb_per_s) for line in report.kernels] == [
        (name, False, None) for name in (DECODE, BATCH, PREFILL, ROUTER)
    ]


def test_measure_decode_times_the_feed_forward_blocks_of_a_token() -> None:
    with like_a_stage_on_a_cpu():
        assert measure_kernels.measure_decode().seconds > 0


def test_k2_is_measured_with_all_its_experts_unless_the_machine_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory_bytes, num_experts in ((None, 384), (400 * 10**9, 384), (6 * 10**9, 64)):
        monkeypatch.setattr(measure_kernels, "working_set_bytes", lambda memory_bytes=memory_bytes: memory_bytes)
        assert K2_CONFIG().n_routed_experts == num_experts


def test_measure_idle_times_the_read_of_memory_before_and_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_kernels, "IDLE_S", 0.05)
    with like_a_stage_on_a_cpu():
        measured = measure_kernels.measure_idle()
    assert measured.held_bytes > 0
    assert min(measured.warm_seconds, measured.idle_seconds) > 0


def test_measure_attention_times_fused_and_unfused_attention_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_kernels, "CHUNK_TOKENS", 16)
    with like_a_stage_on_a_cpu():
        measured = measure_kernels.measure_attention()
    assert min(measured.fused_seconds, measured.unfused_seconds) > 0
