"""Products with a matrix that is either an array or quantized. Only this module distinguishes the two.

Callers multiply by a matrix (..., in, out) from the right. The leading axis, if any, is that of heads, each with its
own matrix.
"""

from typing import NamedTuple

import mlx.core as mx

from mlx_k2.weights.inventory import group_size


class QuantizedMatrix(NamedTuple):
    """A matrix (..., in, out) whose transpose was quantized by mx.quantize, so that inputs are grouped."""

    packed: mx.array  # (..., out, in * bits // 32) uint32
    scales: mx.array  # (..., out, in // group_size)
    biases: mx.array  # (..., out, in // group_size)
    group_size: int
    bits: int


Matrix = mx.array | QuantizedMatrix


def make_matrix(weight: mx.array, bits: int | None) -> Matrix:
    """Return the matrix (..., in, out) of a weight (..., out, in), the layout of checkpoints.

    It is quantized if ``bits`` is not None and its inputs can be grouped.
    """
    group = group_size(weight.shape[-1])
    if bits is None or group is None:
        return _transposed(weight)
    packed, scales, biases = mx.quantize(weight, group_size=group, bits=bits)
    return QuantizedMatrix(packed, scales, biases, group, bits)


def _transposed(weight: mx.array) -> mx.array:
    """Return the transpose: a view, which GPUs multiply fastest.

    For float32 on a CPU return a copy, with which BLAS is 1.4 to 2 times as fast (docs/dev/log.md).
    """
    view = weight.swapaxes(-1, -2)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return mx.contiguous(view) if weight.dtype == mx.float32 and on_cpu else view


def multiply(x: mx.array, matrix: Matrix) -> mx.array:
    """Return x (rows, in) or (heads, rows, in) times a matrix (in, out) or (heads, in, out)."""
    return x @ matrix if isinstance(matrix, mx.array) else _multiply_quantized(x, matrix, transpose=True)


def multiply_transposed(x: mx.array, matrix: Matrix) -> mx.array:
    """Return x (rows, out) times the transpose of a matrix (heads, in, out): (heads, rows, in)."""
    if isinstance(matrix, mx.array):
        return x @ _transposed(matrix)  # used for prompts only, where the copy costs little
    return _multiply_quantized(x, matrix, transpose=False)


def some_heads(matrix: Matrix, heads: slice) -> Matrix:
    """Return the matrices of ``heads``. ``matrix`` has one matrix per head."""
    if isinstance(matrix, mx.array):
        return matrix[heads]
    return matrix._replace(packed=matrix.packed[heads], scales=matrix.scales[heads], biases=matrix.biases[heads])


def _multiply_quantized(x: mx.array, matrix: QuantizedMatrix, *, transpose: bool) -> mx.array:
    if x.ndim < matrix.packed.ndim:
        x = x[None]  # quantized_matmul broadcasts an axis of size 1, but without the axis it reads one head only
    return mx.quantized_matmul(
        x,
        matrix.packed,
        matrix.scales,
        matrix.biases,
        transpose=transpose,
        group_size=matrix.group_size,
        bits=matrix.bits,
    )
