"""Tests of the executor with MLX's own Metal kernels, from the installed wheel's headers.

These kernels are known to be correct on Apple's GPUs. Correct results show that the executor's simd operations,
barriers, matrices and type conversions are those of Metal. The expected results are those of MLX's CPU back end in
float32. In bfloat16 that back end has errors of 5%, because it accumulates in bfloat16.
"""

import itertools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from tests.metal_cpu.execute import Array, to_mlx, to_numpy
from tests.metal_cpu.float64 import relative_error, to_float64
from tests.metal_cpu.program import KernelFault, Mode, Program

pytestmark = pytest.mark.timeout(60)

HEADERS = ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
TOLERANCE = 6e-3
"""Largest allowed error as a fraction of the largest output: results are rounded to bfloat16."""
TWO_SIMDGROUPS = (32, 2, 1)
"""A threadgroup of two simdgroups: 8 outputs of MLX's qmv kernels, 32 columns of affine_gather_qmm_rhs."""
NO_STRIDE = np.int64(0)
UNBATCHED = (1, 1, NO_STRIDE, 1, 1, NO_STRIDE, NO_STRIDE, NO_STRIDE)
"""Batch shapes and strides, which a kernel for a single matrix does not read."""

modes = pytest.mark.parametrize(
    "mode",
    [Mode.FAST, pytest.param(Mode.ADDRESSES, marks=pytest.mark.slow), pytest.param(Mode.RACES, marks=pytest.mark.slow)],
)


def quantized(*shape: int) -> tuple[mx.array, mx.array, mx.array]:
    """Return packed weights, scales and biases of a random matrix."""
    packed, scales, *biases = mx.quantize(mx.random.normal(shape).astype(mx.bfloat16) * 0.05, group_size=32, bits=4)
    return packed, scales, biases[0]


def scalars(values: Sequence[int | np.int64]) -> list[Array]:
    """Return each value as a buffer of one int32, or of one int64 if it has this type."""
    return [np.array([value], np.int64 if isinstance(value, np.int64) else np.int32) for value in values]


def run_kernel(
    name: str,
    template: dict[str, str],
    buffers: Sequence[Array],
    *,
    output: int,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    mode: Mode,
    constants: str = "",
) -> mx.array:
    """Run one of MLX's kernels; return buffer number ``output``. ``constants`` sets function constants."""
    arguments = {"T": "bfloat16_t", "group_size": "32", "bits": "4"} | template
    program = Program("", name, arguments, headers=HEADERS, constants=constants, mode=mode)
    (result,), _ = program(buffers, frozenset({output}), grid, threadgroup)
    return to_mlx(result, mx.bfloat16)


def quantized_product(x: mx.array, packed: mx.array, scales: mx.array, biases: mx.array) -> npt.NDArray[np.float64]:
    """Return the expected product of x and a quantized matrix."""
    f32 = mx.float32
    return to_float64(
        mx.quantized_matmul(
            x.astype(f32), packed, scales.astype(f32), biases.astype(f32), transpose=True, group_size=32, bits=4
        )
    )


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    mx.random.seed(0)


def bfloat16_zeros(*shape: int) -> npt.NDArray[np.uint16]:
    """Return the buffer of an output in bfloat16."""
    return np.zeros(shape, np.uint16)


@modes
def test_mlx_qmv_fast_is_correct(mode: Mode) -> None:
    inputs, outputs, tokens = 1024, 24, 2
    weights = quantized(outputs, inputs)
    x = mx.random.normal((tokens, inputs)).astype(mx.bfloat16)
    buffers = [*map(to_numpy, (*weights, x)), bfloat16_zeros(tokens, outputs), *scalars((inputs, outputs, *UNBATCHED))]
    grid = (tokens * 32, outputs // 8 * 2, 1)
    y = run_kernel(
        "affine_qmv_fast", {"batched": "false"}, buffers, output=4, grid=grid, threadgroup=TWO_SIMDGROUPS, mode=mode
    )
    assert relative_error(y, quantized_product(x, *weights)) <= TOLERANCE


@modes
def test_mlx_qmv_is_correct_for_sizes_that_tiles_do_not_divide_and_has_a_known_race(mode: Mode) -> None:
    inputs, outputs, tokens = 352, 43, 2
    weights = quantized(outputs, inputs)
    x = mx.random.normal((tokens, inputs)).astype(mx.bfloat16)
    buffers = [*map(to_numpy, (*weights, x)), bfloat16_zeros(tokens, outputs), *scalars((inputs, outputs, *UNBATCHED))]
    grid = (tokens * 32, (outputs + 7) // 8 * 2, 1)
    if mode is Mode.RACES:
        # The last tile begins earlier and computes rows of the tile before it again: a harmless race.
        with pytest.raises(KernelFault, match="data race"):
            run_kernel(
                "affine_qmv", {"batched": "false"}, buffers, output=4, grid=grid, threadgroup=TWO_SIMDGROUPS, mode=mode
            )
        return
    y = run_kernel(
        "affine_qmv", {"batched": "false"}, buffers, output=4, grid=grid, threadgroup=TWO_SIMDGROUPS, mode=mode
    )
    assert relative_error(y, quantized_product(x, *weights)) <= TOLERANCE


@modes
def test_mlx_qmv_wide_is_correct(mode: Mode) -> None:
    inputs, outputs, tokens = 512, 24, 4
    weights = quantized(outputs, inputs)
    x = mx.random.normal((tokens, inputs)).astype(mx.bfloat16)
    sizes = scalars((inputs, outputs, tokens, *UNBATCHED))
    buffers = [*map(to_numpy, (*weights, x)), bfloat16_zeros(tokens, outputs), *sizes]
    template = {"vecs_per_tg": "4", "k_lanes": "8", "batched": "false"}
    grid = (32, (outputs + 7) // 8 * 2, 1)
    y = run_kernel("affine_qmv_wide", template, buffers, output=4, grid=grid, threadgroup=TWO_SIMDGROUPS, mode=mode)
    assert relative_error(y, quantized_product(x, *weights)) <= TOLERANCE


@modes
def test_mlx_gather_qmv_fast_is_correct(mode: Mode) -> None:
    experts, pairs, inputs, outputs = 6, 8, 512, 16
    packed, scales, biases = quantized(experts, outputs, inputs)
    x = mx.random.normal((2, 1, inputs)).astype(mx.bfloat16)
    rows, ids = np.repeat([0, 1], 4).astype(np.uint32), np.array([5, 0, 3, 2, 1, 1, 4, 5], np.uint32)
    words, groups = inputs // 8, inputs // 32
    shapes: list[Array] = [  # sizes, then shapes and strides of x, of the weights, of scales and biases, and of the ids
        *scalars((inputs, outputs, 1)),
        np.array((2, 1, inputs), np.int32),
        np.array((inputs, inputs, 1), np.int64),
        *scalars((1,)),
        np.array((experts, outputs, words), np.int32),
        np.array((outputs * words, words, 1), np.int64),
        np.array((outputs * groups, groups, 1), np.int64),
        np.array((outputs * groups, groups, 1), np.int64),
        *scalars((1, pairs, np.int64(1), np.int64(1))),
    ]
    buffers = [*map(to_numpy, (packed, scales, biases, x)), rows, ids, bfloat16_zeros(pairs, 1, outputs), *shapes]
    grid = (32, outputs // 8 * 2, pairs)
    y = run_kernel("affine_gather_qmv_fast", {}, buffers, output=6, grid=grid, threadgroup=TWO_SIMDGROUPS, mode=mode)
    expected = np.stack(
        [
            quantized_product(x[row], packed[expert], scales[expert], biases[expert])
            for row, expert in zip(rows.tolist(), ids.tolist(), strict=True)
        ]
    )
    assert relative_error(y, expected) <= TOLERANCE


@modes
def test_mlx_qmm_t_with_simdgroup_matrices_is_correct(mode: Mode) -> None:
    inputs, outputs, tokens = 128, 40, 37
    weights = quantized(outputs, inputs)
    x = mx.random.normal((tokens, inputs)).astype(mx.bfloat16)
    buffers = [
        *map(to_numpy, (*weights, x)),
        bfloat16_zeros(tokens, outputs),
        *scalars((inputs, outputs, tokens, *UNBATCHED)),
    ]
    grid = ((outputs + 31) // 32 * 32, (tokens + 31) // 32 * 2, 2)
    y = run_kernel(
        "affine_qmm_t",
        {"aligned_N": "false", "batched": "false"},
        buffers,
        output=4,
        grid=grid,
        threadgroup=(32, 2, 2),
        mode=mode,
    )
    assert relative_error(y, quantized_product(x, *weights)) <= TOLERANCE


@modes
def test_mlx_gather_qmm_rhs_is_correct(mode: Mode) -> None:
    experts, inputs, outputs, tile_rows = 5, 96, 48, 16
    counts = np.array([7, 0, 33, 12, 1])
    rows = int(counts.sum())
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    packed, scales, biases = quantized(experts, outputs, inputs)
    x = mx.random.normal((rows, 1, inputs)).astype(mx.bfloat16)
    num_tiles = int(np.ceil(counts / tile_rows).sum()) + 2  # two threadgroups find no tile
    template = {"BM": str(tile_rows), "BN": "32", "BK": "32", "WM": "1", "WN": "2", "transpose": "true"}
    constants = "align_M = false; align_N = false; align_K = true;"
    buffers = [
        *map(to_numpy, (x, packed, scales, biases)),
        offsets,
        bfloat16_zeros(rows, outputs),
        *scalars((rows, outputs, inputs, experts)),
    ]
    grid = ((outputs + 31) // 32 * 32, num_tiles * 2, 1)
    y = run_kernel(
        "affine_gather_qmm_rhs",
        template,
        buffers,
        output=5,
        grid=grid,
        threadgroup=TWO_SIMDGROUPS,
        mode=mode,
        constants=constants,
    )
    expected = np.concatenate(
        [
            quantized_product(x[first:end, 0], packed[expert], scales[expert], biases[expert])
            for expert, (first, end) in enumerate(itertools.pairwise(offsets.tolist()))
            if first < end
        ]
    )
    assert relative_error(y, expected) <= TOLERANCE
