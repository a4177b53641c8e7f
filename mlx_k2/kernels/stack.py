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
