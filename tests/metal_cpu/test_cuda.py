"""Tests of the decode and batch kernels as CUDA: they compile, and cost as much as unrolled loops.

Costs in CUDA differ from those on a Mac, but they show a loop that is no longer unrolled, an array that is no longer in
registers, or a load that is split.
"""

import mlx.core as mx
import pytest

from mlx_k2.kernels import decode
from mlx_k2.kernels.dispatch import Dispatch
from mlx_k2.kernels.stack import ExpertStack
from tests.metal_cpu.nvrtc import compile_cuda, cuda_source

pytestmark = pytest.mark.timeout(60)

HIDDEN, INTERMEDIATE, TOP_K = 7168, 2048, 8
MAX_REGISTERS = 128
"""Registers per thread with which an SM can still run 512 threads."""
WEIGHTS_PER_LOAD = 32
"""The number of INT4 codes in 16 bytes."""


def k2_dispatches(tokens: int, rows: int) -> dict[str, Dispatch]:
    """Return the dispatches of gate_up and down by name, at K2's size with two experts. No array is ever evaluated."""

    def projection(outputs: int, inputs: int) -> tuple[mx.array, mx.array]:
        return mx.zeros((2, outputs, inputs // 8), mx.uint32), mx.zeros((2, outputs, inputs // 32), mx.bfloat16)

    stack = ExpertStack(
        *projection(INTERMEDIATE, HIDDEN), *projection(INTERMEDIATE, HIDDEN), *projection(HIDDEN, INTERMEDIATE)
    )
    x, hidden = mx.zeros((tokens, HIDDEN), mx.bfloat16), mx.zeros((tokens, TOP_K, INTERMEDIATE), mx.bfloat16)
    ids, weights = mx.zeros((tokens, TOP_K), mx.uint32), mx.zeros((tokens, TOP_K))
    if tokens == 1:
        return {
            "gate_up": decode.gate_up(x, ids, stack, rows_per_simdgroup=rows, simdgroups=2),
            "down": decode.down(hidden, ids, weights, stack, rows_per_simdgroup=rows),
        }
    return {
        "gate_up": decode.gate_up(x, ids, stack, rows_per_simdgroup=rows, simdgroups=2, is_batch=True),
        "down": decode.down(hidden, ids, weights, stack, rows_per_simdgroup=rows, batch_simdgroups=8),
    }


@pytest.mark.parametrize("rows", [2, 4, 8])
@pytest.mark.parametrize(("half", "projections"), [("gate_up", 2), ("down", 1)])
def test_decode_kernels_unroll_and_load_16_bytes_at_a_time(half: str, projections: int, rows: int) -> None:
    cost = compile_cuda(cuda_source(k2_dispatches(1, rows)[half]))
    assert cost.spilled_bytes == 0
    assert cost.registers <= 64 + 4 * rows < MAX_REGISTERS  # each row has some registers for its scale and sums
    weight_loads = projections * rows
    assert cost.loads_of_16_bytes % weight_loads == 0
    assert cost.loads_of_16_bytes >= weight_loads
    unroll_factor = cost.loads_of_16_bytes // weight_loads
    num_weights = WEIGHTS_PER_LOAD * weight_loads * unroll_factor
    assert cost.converts == num_weights, "not one conversion for each weight"
    assert cost.fmas <= 1.1 * num_weights + 40, "more than about one multiply-add for each weight"


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "rows"), [(2, 2), (4, 2), (8, 2), (16, 1)])
@pytest.mark.parametrize("half", ["gate_up", "down"])
def test_batch_kernels_convert_a_weight_once_for_all_tokens(half: str, tokens: int, rows: int) -> None:
    cost = compile_cuda(cuda_source(k2_dispatches(tokens, rows)[half]))
    assert cost.spilled_bytes == 0
    assert cost.registers <= MAX_REGISTERS
    weight_loads = (2 if half == "gate_up" else 1) * rows
    unroll_factor = cost.loads_of_16_bytes // weight_loads
    assert cost.converts == WEIGHTS_PER_LOAD * weight_loads * unroll_factor
