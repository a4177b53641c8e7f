"""The weights of one layer's routed experts, in the checkpoint's format. Computes no products."""

from typing import NamedTuple

import mlx.core as mx

GROUP_SIZE = 32  # weights that share one scale
BITS = 4
ZERO_POINT = 8  # a stored code q means the weight scale * (q - 8)
CODES_PER_WORD = 8  # 4-bit codes in one uint32, low bits first


class ExpertStack(NamedTuple):
    """One layer's routed experts: 4.5 bits per weight, scales without biases."""

    gate_packed: mx.array  # (experts, intermediate, hidden // 8) uint32
    gate_scale: mx.array  # (experts, intermediate, hidden // 32) bfloat16
    up_packed: mx.array  # (experts, intermediate, hidden // 8) uint32
    up_scale: mx.array  # (experts, intermediate, hidden // 32) bfloat16
    down_packed: mx.array  # (experts, hidden, intermediate // 8) uint32
    down_scale: mx.array  # (experts, hidden, intermediate // 32) bfloat16

    @property
    def num_experts(self) -> int:
        """Number of experts in the layer."""
        return self.gate_packed.shape[0]

    @property
    def intermediate_size(self) -> int:
        """Rows of gate and up."""
        return self.gate_packed.shape[1]

    @property
    def hidden_size(self) -> int:
        """Rows of down."""
        return self.down_packed.shape[1]


class AffineStack(NamedTuple):
    """One layer's routed experts with the biases that MLX's affine product requires, for models that use no kernel.

    Scales are in the activations' dtype. Each bias is -ZERO_POINT times its scale.
    """

    experts: ExpertStack
    gate_bias: mx.array
    up_bias: mx.array
    down_bias: mx.array


def make_affine(stack: ExpertStack, dtype: mx.Dtype) -> AffineStack:
    """Return the experts with scales and biases for activations of ``dtype``. Conversion to float32 is exact."""
    gate, up, down = (scale.astype(dtype) for scale in (stack.gate_scale, stack.up_scale, stack.down_scale))
    biases = (scale * -ZERO_POINT for scale in (gate, up, down))
    return AffineStack(stack._replace(gate_scale=gate, up_scale=up, down_scale=down), *biases)
