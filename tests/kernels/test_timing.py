"""Tests of the table of `mlx-k2 kernels`: which kernels are timed, and that the fastest tuning is found and cached."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_k2.kernels import check_cache, experts, reference, timing
from mlx_k2.kernels.layer_time import Layer, Timing, time_layer
from mlx_k2.kernels.self_check import DECODE, KernelCheck, LayerShape, random_stack
from mlx_k2.kernels.stack import ExpertStack
from mlx_k2.kernels.tuning import DEFAULT, Tuning

pytestmark = pytest.mark.timeout(30)

SHAPE = LayerShape(hidden_size=64, intermediate_size=32, top_k=4, dtype=mx.float32)


def test_a_layers_timing_counts_the_bytes_of_its_distinct_experts() -> None:
    stack = random_stack(SHAPE, num_experts=8)
    measured = time_layer(reference.routed_experts, stack, tokens=1, top_k=4, chain=2, repeats=1)
    assert measured.seconds > 0
    assert measured.bytes_needed == 4 * sum(array.nbytes for array in stack) // 8  # 4 of the 8 experts
    assert measured.gigabytes_per_second == pytest.approx(measured.bytes_needed / measured.seconds / 1e9)


def test_the_speed_of_a_plain_read_is_above_0() -> None:
    assert timing.plain_read_gigabytes_per_second(random_stack(SHAPE, 8)) > 0


def test_without_a_gpu_the_kernel_table_is_empty() -> None:
    if mx.default_device().type == mx.DeviceType.gpu:
        return
    assert timing.kernel_lines(SHAPE, random_stack(SHAPE, SHAPE.num_experts), DEFAULT) == []


def test_an_unusable_kernel_is_not_timed_but_the_reference_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_cache, "DEFAULT_DIRECTORY", tmp_path)
    unusable = KernelCheck(
        DECODE, usable=False, error=0.5, reason="off by 5e-01 of the largest output, more than 1e-05"
    )
    path = check_cache.cache_path(tmp_path, SHAPE, experts.chip())
    check_cache.store(path, check_cache.CachedChecks([unusable], tuning=None))
    (line,) = timing.kernel_lines(SHAPE, random_stack(SHAPE, SHAPE.num_experts), DEFAULT)
    assert (line.kernel, line.usable, line.reason, line.tokens) == (DECODE, False, unusable.reason, 1)
    assert line.gb_per_s is None
    assert line.plain_mlx_gb_per_s is not None and line.plain_mlx_gb_per_s > 0


def test_the_fastest_tuning_is_found_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_cache, "DEFAULT_DIRECTORY", tmp_path)
    tried: list[Tuning] = []

    def layer_of(_tokens: int, tuning: Tuning) -> Layer:
        tried.append(tuning)
        return reference.routed_experts

    def time_last_tuning(_layer: Layer, _stack: ExpertStack, _tokens: int, _top_k: int) -> Timing:
        """Return the shortest time for 8 rows of gate and up and 2 of down; else prefer more of gate and up."""
        tuning = tried[-1]
        is_best = (tuning.gate_up_rows, tuning.down_rows) == (8, 2)
        return Timing(seconds=1.0 if is_best else 2.0 - tuning.gate_up_rows / 100, bytes_needed=1)

    monkeypatch.setattr(experts, "layer_of", layer_of)
    monkeypatch.setattr(
        timing, "check_kernel", lambda name, _shape, tuning: KernelCheck(name, usable=tuning.batch_rows != 1)
    )
    monkeypatch.setattr(timing, "time_layer", time_last_tuning)
    best = timing.best_tuning(SHAPE, DEFAULT)
    assert (best.gate_up_rows, best.down_rows) == (8, 2)
    assert all(tuning.batch_rows != 1 for tuning in tried)  # its check failed, so it is not timed
    cached = check_cache.load(check_cache.cache_path(tmp_path, SHAPE, experts.chip()))
    assert cached is not None
    assert cached.tuning == best


def test_the_default_tuning_divides_32_rows() -> None:
    assert 32 % (DEFAULT.gate_up_rows * DEFAULT.gate_up_simdgroups) == 0
    assert 32 % (DEFAULT.batch_rows * DEFAULT.gate_up_simdgroups) == 0
    assert 32 % DEFAULT.down_rows == 0
    assert DEFAULT.batch_simdgroups <= 32  # of 32 threads each: a threadgroup has at most 1024
