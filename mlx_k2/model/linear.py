"""Products with a matrix that is an array or quantized. Everything else in the model leaves the difference to this.

A matrix is (..., in, out) to its callers, to be multiplied from the right; leading axes are heads, each with its own.
"""

from typing import NamedTuple

import mlx.core as mx

from mlx_k2.weights.dense_matrices import group_size


class QuantizedMatrix(NamedTuple):
    """(..., in, out) as mx.quantize holds its transpose: groups run along the inputs."""

    packed: mx.array  # (..., out, in * bits // 32) uint32
    scales: mx.array  # (..., out, in // group_size)
    biases: mx.array  # (..., out, in // group_size)
    group_size: int
    bits: int


Matrix = mx.array | QuantizedMatrix


def make_matrix(weight: mx.array, bits: int | None) -> Matrix:
    """A weight (..., out, in), as checkpoints have it, made ready to multiply with.

    With ``bits`` it is quantized, unless its inputs cannot be grouped. Without, it is transposed.
    """
    group = group_size(weight.shape[-1])
    if bits is None or group is None:
        return _transposed(weight)
    packed, scales, biases = mx.quantize(weight, group_size=group, bits=bits)
    return QuantizedMatrix(packed, scales, biases, group, bits)


def _transposed(weight: mx.array) -> mx.array:
    """A view, which GPUs multiply best. Float32 on a CPU is copied: BLAS is 1.4 to 2 times as fast (docs/log.md)."""
    view = weight.swapaxes(-1, -2)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return mx.contiguous(view) if weight.dtype == mx.float32 and on_cpu else view


def multiply(x: mx.array, matrix: Matrix) -> mx.array:
    """(rows, in) or (heads, rows, in) times (in, out) or (heads, in, out)."""
    return x @ matrix if isinstance(matrix, mx.array) else _multiply_quantized(x, matrix, transpose=True)


def multiply_transposed(x: mx.array, matrix: Matrix) -> mx.array:
    """(rows, out) times the transpose of (heads, in, out): (heads, rows, in)."""
    if isinstance(matrix, mx.array):
        return x @ _transposed(matrix)  # laid out anew by each call: little beside the rows of a prompt
    return _multiply_quantized(x, matrix, transpose=False)


def some_heads(matrix: Matrix, heads: slice) -> Matrix:
    """Those of a matrix with one for each head."""
    if isinstance(matrix, mx.array):
        return matrix[heads]
    return matrix._replace(packed=matrix.packed[heads], scales=matrix.scales[heads], biases=matrix.biases[heads])


def _multiply_quantized(x: mx.array, matrix: QuantizedMatrix, *, transpose: bool) -> mx.array:
    if x.ndim < matrix.packed.ndim:
        x = x[None]  # quantized_matmul broadcasts an axis that is there; one that is missing makes it read one head
    return mx.quantized_matmul(
        x,
        matrix.packed,
        matrix.scales,
        matrix.biases,
        transpose=transpose,
        group_size=matrix.group_size,
        bits=matrix.bits,
    )
