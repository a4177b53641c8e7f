"""Tests of the kernel check that runs on a Mac: it accepts our kernels, and refuses wrong and uncompilable ones."""

import mlx.core as mx
import pytest

from mlx_k2.kernels.dispatch import Dispatch
from mlx_k2.kernels.self_check import BATCH, DECODE, PREFILL, ROUTER, KernelCheck, LayerShape, check_kernel
from mlx_k2.kernels.tuning import DEFAULT
from tests.metal_cpu.execute import execute, with_body

pytestmark = pytest.mark.timeout(60)

SHAPE = LayerShape(hidden_size=64, intermediate_size=32, top_k=4, dtype=mx.bfloat16)


def perform(dispatch: Dispatch) -> list[mx.array]:
    """Run a kernel in the executor."""
    return execute(dispatch).outputs


def perform_wrong(dispatch: Dispatch) -> list[mx.array]:
    """Run a kernel with a fault planted in its source: one in each family of kernels."""
    source = dispatch.text.source.replace("N + row", "N")  # in decode_down and batch_down
    source = source.replace("== winner ? -INFINITY", "== winner ? 2.0f")  # in router_select
    source = source.replace("column0 + w_row", "w_row / 2")  # in prefill_gate_up and prefill_down
    return execute(with_body(dispatch, source)).outputs


def perform_uncompilable(dispatch: Dispatch) -> list[mx.array]:
    """Raise the error of MLX for a kernel that does not compile."""
    raise RuntimeError(
        f"[metal::Device] Unable to build metal library from source\n{dispatch.text.name}.metal:3: error"
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=["bfloat16", "float32"])
def test_our_kernels_are_usable(dtype: mx.Dtype) -> None:
    for kernel in (DECODE, BATCH, PREFILL, ROUTER):
        check = check_kernel(kernel, SHAPE._replace(dtype=dtype), DEFAULT, perform)
        assert (check.kernel, check.usable, check.reason) == (kernel, True, "")


@pytest.mark.parametrize("kernel", [DECODE, BATCH, PREFILL, ROUTER])
def test_a_wrong_kernel_is_unusable_and_its_error_is_reported(kernel: str) -> None:
    check = check_kernel(kernel, SHAPE, DEFAULT, perform_wrong)
    assert not check.usable
    assert check.error is not None
    assert check.reason.startswith("off by ")


@pytest.mark.parametrize("kernel", [DECODE, BATCH, PREFILL, ROUTER])
def test_a_kernel_that_does_not_compile_is_unusable_with_a_one_line_reason(kernel: str) -> None:
    reason = "[metal::Device] Unable to build metal library from source"
    assert check_kernel(kernel, SHAPE, DEFAULT, perform_uncompilable) == KernelCheck(kernel, False, None, reason)
