"""Norm, linear layer and SwiGLU with weights rounded to bfloat16, as in the exported model. Knows nothing of layers."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn


class Norm(nn.Module):
    """RMS norm with a weight rounded to bfloat16."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis. The result has x's dtype."""
        normed: Tensor = F.rms_norm(x, x.shape[-1:], as_bfloat16(self.weight).to(x.dtype), self.eps)
        return normed


class Linear(nn.Module):
    """A matrix product with a weight rounded to bfloat16."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * gain * inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs) in x's dtype."""
        product: Tensor = F.linear(x, as_bfloat16(self.weight).to(x.dtype))
        return product


def as_bfloat16(weight: Tensor) -> Tensor:
    """Return the weight in bfloat16. The gradient passes through."""
    return weight.bfloat16()


class FeedForward(nn.Module):
    """SwiGLU, used for the dense first layer and the shared expert."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate)
        self.up_proj = Linear(hidden, intermediate)
        self.down_proj = Linear(intermediate, hidden, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., hidden) to the same shape."""
        product: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return product
