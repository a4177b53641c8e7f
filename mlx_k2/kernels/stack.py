"""The weights of one layer's routed experts, as shipped. Knows nothing of how they are multiplied."""

from typing import NamedTuple

import mlx.core as mx

GROUP_SIZE = 32  # weights that share one scale
BITS = 4
ZERO_POINT = 8  # a stored code q means the weight scale * (q - 8)
CODES_PER_WORD = 8  # 4-bit codes in one uint32, low bits first


class ExpertStack(NamedTuple):
    """One layer's routed experts: 4.5 bits a weight, scales without biases."""

    gate_packed: mx.array  # (experts, intermediate, hidden // 8) uint32
    gate_scale: mx.array  # (experts, intermediate, hidden // 32) bfloat16
    up_packed: mx.array  # (experts, intermediate, hidden // 8) uint32
    up_scale: mx.array  # (experts, intermediate, hidden // 32)
    down_packed: mx.array  # (experts, hidden, intermediate // 8) uint32
    down_scale: mx.array  # (experts, hidden, intermediate // 32)

    @property
    def num_experts(self) -> int:
        """How many experts the layer has."""
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
    """The same experts as MLX's affine product wants them, for dtypes that no kernel computes in.

    Scales are in the activations' dtype, and beside each stands its bias, -ZERO_POINT times as large.
    """

    experts: ExpertStack
    gate_bias: mx.array
    up_bias: mx.array
    down_bias: mx.array


def make_affine(stack: ExpertStack, dtype: mx.Dtype) -> AffineStack:
    """What multiplies activations of ``dtype``; the scales are exact in it if it is float32."""
    gate, up, down = (scale.astype(dtype) for scale in (stack.gate_scale, stack.up_scale, stack.down_scale))
    biases = (scale * -ZERO_POINT for scale in (gate, up, down))
    return AffineStack(stack._replace(gate_scale=gate, up_scale=up, down_scale=down), *biases)
