"""K2's rotary positions: interleaved, scaled by YaRN. Knows nothing of attention but its scale."""

import math

import torch
from torch import Tensor

from training.shape import Shape


def yarn_frequencies(shape: Shape) -> Tensor:
    """Return radians per position (rope dim / 2,): low frequencies divided by the factor after a ramp (YaRN, 3.2)."""
    dim = shape.qk_rope_head_dim
    plain = shape.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def pair_with(beta: float) -> float:
        """Return the index of the pair that turns ``beta`` times over the original positions."""
        ratio = shape.rope_original_positions / (beta * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(shape.rope_theta))

    low = max(math.floor(pair_with(shape.rope_beta_fast)), 0)
    high = min(math.ceil(pair_with(shape.rope_beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return (plain / shape.rope_factor * ramp + plain * (1 - ramp)).float()


def softmax_scale(shape: Shape) -> float:
    """Return mscale squared / sqrt(head dim), with mscale = 0.1 ln(factor) + 1."""
    mscale = 0.1 * math.log(shape.rope_factor) + 1.0
    return mscale * mscale / math.sqrt(shape.qk_nope_head_dim + shape.qk_rope_head_dim)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Apply interleaved rope: rotate pair (2i, 2i+1) of the last axis by angle i. `angles` broadcasts over heads."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
