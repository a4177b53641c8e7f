"""The memory of attention, shared experts, dense layers and the head with --dense-bits. Sizes only, no arrays.

Their matrices are quantized while loading, as mx.quantize does it: ``bits`` per weight, and a scale and a bias in the
compute dtype for each group of inputs of one output.
"""

from typing import NamedTuple

GROUP_SIZES = (64, 32)
"""The first size that divides a matrix's inputs is used; a matrix that none divides is not quantized."""


class DenseMatrix(NamedTuple):
    """The shape of a matrix that is multiplied with the values of each token."""

    outputs: int
    inputs: int

    def held_bytes(self, compute_bytes: int, bits: int | None) -> int:
        """Return the bytes in memory; ``bits`` None: the matrix is not quantized."""
        num_weights = self.outputs * self.inputs
        group = group_size(self.inputs)
        if bits is None or group is None:
            return num_weights * compute_bytes
        return num_weights * bits // 8 + num_weights // group * 2 * compute_bytes


def group_size(inputs: int) -> int | None:
    """Return how many inputs share a scale and a bias; None if they cannot be grouped."""
    return next((size for size in GROUP_SIZES if inputs % size == 0), None)
