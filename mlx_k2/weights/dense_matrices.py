"""How attention, shared experts, dense layers and the head are held with --dense-bits. Sizes only, no arrays.

Their matrices are quantized while loading, as mx.quantize does it: for each group of inputs of one output a scale and a
bias in the compute dtype, and ``bits`` for each weight.
"""

from typing import NamedTuple

GROUP_SIZES = (64, 32)
"""The first that divides a matrix's inputs is taken; a matrix that none divides stays as it is."""


class DenseMatrix(NamedTuple):
    """A matrix that tokens are multiplied with."""

    outputs: int
    inputs: int

    def held_bytes(self, compute_bytes: int, bits: int | None) -> int:
        """Bytes in memory; ``bits`` None: it is not quantized."""
        num_weights = self.outputs * self.inputs
        group = group_size(self.inputs)
        if bits is None or group is None:
            return num_weights * compute_bytes
        return num_weights * bits // 8 + num_weights // group * 2 * compute_bytes


def group_size(inputs: int) -> int | None:
    """Inputs that share a scale and a bias; None where they cannot be grouped."""
    return next((size for size in GROUP_SIZES if inputs % size == 0), None)
