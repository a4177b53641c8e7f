"""Tests of the choice of a kernel by device, KernelCheck and number of tokens, and of the cached checks."""

import logging
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_k2.kernels import check_cache, experts, reference
from mlx_k2.kernels.self_check import BATCH, DECODE, PREFILL, KernelCheck, LayerShape, random_stack
from mlx_k2.kernels.stack import make_affine
from mlx_k2.kernels.tuning import DEFAULT
from tests.metal_cpu.float64 import random_case

pytestmark = pytest.mark.timeout(30)

SHAPE = LayerShape(hidden_size=64, intermediate_size=32, top_k=4, dtype=mx.bfloat16)


def test_without_a_gpu_the_reference_runs_and_no_kernel_is_checked() -> None:
    case = random_case(experts=4, tokens=3, top_k=2, hidden=64, intermediate=32, dtype=mx.float32)
    with mx.stream(mx.cpu):
        got = experts.routed_experts(case.x, case.expert_ids, case.expert_weights, case.stack)
        expected = reference.routed_experts(case.x, case.expert_ids, case.expert_weights, case.stack)
        assert experts.prepare(case.stack, 2, mx.float32) == ()
    assert mx.array_equal(got, expected).item()


@pytest.mark.parametrize(("tokens", "kernel"), [(1, DECODE), (2, BATCH), (16, BATCH), (17, PREFILL), (4096, PREFILL)])
def test_kernel_for_chooses_by_the_number_of_tokens(tokens: int, kernel: str) -> None:
    assert experts.kernel_for(tokens)[0] == kernel


def test_stored_kernel_checks_are_loaded_again(tmp_path: Path) -> None:
    path = check_cache.cache_path(tmp_path / "new", SHAPE, "Apple M9")
    cached = check_cache.CachedChecks(
        [KernelCheck(DECODE, True, 1e-3, ""), KernelCheck(BATCH, False, None, "no")], DEFAULT
    )
    assert check_cache.load(path) is None
    check_cache.store(path, cached, "Apple M9")
    assert check_cache.load(path) == cached


def test_the_cache_path_depends_on_chip_shape_and_kernel_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [
        check_cache.cache_path(tmp_path, SHAPE, "Apple M9"),
        check_cache.cache_path(tmp_path, SHAPE, "Apple M8"),
        check_cache.cache_path(tmp_path, SHAPE._replace(top_k=8), "Apple M9"),
        check_cache.cache_path(tmp_path, SHAPE._replace(dtype=mx.float32), "Apple M9"),
    ]
    monkeypatch.setattr(check_cache, "metal_texts", lambda: ["another text"])
    paths.append(check_cache.cache_path(tmp_path, SHAPE, "Apple M9"))
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"checks": [{"kernel": 1}], "tuning": null}', "[]"])
def test_an_unreadable_cache_file_loads_as_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "checks.json"
    path.write_text(content)
    assert check_cache.load(path) is None


def test_storing_checks_in_an_unwritable_directory_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_cache.store(tmp_path / "file" / "checks.json", check_cache.CachedChecks([], None), "Apple M9")


@pytest.fixture
def _metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Select the kernels as on a Mac. None of them can run here: calling one raises."""
    monkeypatch.setattr(experts, "_backend_kernels", lambda: experts.METAL_KERNELS)


@pytest.mark.usefixtures("_metal")
def test_a_failed_kernel_is_logged_once_and_not_checked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        first = experts.checks(SHAPE, tmp_path)
        again = experts.checks(SHAPE, tmp_path)
    assert [v.usable for v in first.checks] == [False, False, False]
    assert again == first
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        f"the {name} kernel is not used here" for name in (DECODE, BATCH, PREFILL)
    ]


@pytest.mark.usefixtures("_metal")
def test_a_check_that_crashed_the_process_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ProcessGone(BaseException):
        pass

    def crash(*_: object) -> KernelCheck:
        raise ProcessGone

    monkeypatch.setattr(experts, "check_kernel", crash)
    with pytest.raises(ProcessGone):
        experts.checks(SHAPE, tmp_path)
    monkeypatch.setattr(experts, "check_kernel", lambda name, *_: KernelCheck(name, True, 0.0, ""))
    checks = {v.kernel: v for v in experts.checks(SHAPE, tmp_path).checks}
    assert not checks[DECODE].usable
    assert checks[DECODE].reason == "an earlier check did not come back"
    assert checks[BATCH].usable


@pytest.mark.usefixtures("_metal")
def test_the_reference_runs_when_no_kernel_is_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_cache, "DEFAULT_DIRECTORY", tmp_path)
    case = random_case(experts=4, tokens=3, top_k=2, hidden=64, intermediate=32, dtype=mx.float32)
    got = experts.routed_experts(case.x, case.expert_ids, case.expert_weights, case.stack)
    expected = reference.routed_experts(case.x, case.expert_ids, case.expert_weights, case.stack)
    assert np.array_equal(np.array(got), np.array(expected))


@pytest.mark.usefixtures("_metal")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=["bfloat16", "float32"])
def test_prepare_reports_each_unused_kernel_and_does_not_check_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype
) -> None:
    monkeypatch.setattr(check_cache, "DEFAULT_DIRECTORY", tmp_path)
    experts.usable.cache_clear()
    shipped = random_stack(SHAPE, 4)
    stack = shipped if dtype == mx.bfloat16 else make_affine(shipped, dtype)
    lines = experts.prepare(stack, SHAPE.top_k, dtype)
    unused = [line for line in lines if line.endswith("plain MLX runs instead")]
    assert len(unused) == len(lines) == (4 if dtype == mx.bfloat16 else 2)
    monkeypatch.setattr(experts, "check_kernel", lambda *_: pytest.fail("checked again"))
    monkeypatch.setattr(check_cache, "DEFAULT_DIRECTORY", tmp_path / "as if it could not be written")
    assert experts.prepare(stack, SHAPE.top_k, dtype) == lines
    experts.usable.cache_clear()
