"""K2's INT4 format: symmetric, in groups of 32 inputs with one bfloat16 scale each. Knows no model."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

GROUP = 32
LOWEST, HIGHEST = -8, 7
_HALF_RANGE = (HIGHEST - LOWEST) / 2


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes in [-8, 7] (float, the weight's shape) and bfloat16 scales (..., outputs, inputs / 32)."""
    groups = weight.unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1) / _HALF_RANGE).clamp(min=1e-8).bfloat16()
    codes = (groups / scale.float().unsqueeze(-1)).round_().clamp_(LOWEST, HIGHEST)
    return codes.flatten(-2), scale


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weight of codes and scales."""
    weight: Tensor = (codes.unflatten(-1, (-1, GROUP)) * scale.float().unsqueeze(-1)).flatten(-2)
    return weight


def pack(codes: Tensor) -> Tensor:
    """Pack codes (outputs, inputs) into int32 (outputs, inputs / 8): offset 8, eight nibbles a word, lowest first."""
    nibbles = (codes.long() - LOWEST).unflatten(-1, (-1, 8))
    words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpack(words: Tensor) -> Tensor:
    """Return the codes (outputs, inputs), as floats, of int32 words (outputs, inputs / 8)."""
    nibbles = (words.long().unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    return (nibbles + LOWEST).flatten(-2).float()


class _RoundToInt4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor) -> Tensor:  # noqa: ARG004 - torch hands it in
        return dequantize(*quantize(weight))

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:  # noqa: ARG004 - torch hands it in
        return grad


def round_to_int4(weight: Tensor) -> Tensor:
    """Return the weight rounded to INT4. The gradient passes straight through."""
    rounded: Tensor = _RoundToInt4.apply(weight)
    return rounded
