"""Norm, product and SwiGLU whose weights are seen in bfloat16, as they are shipped. Knows nothing of layers."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn


class Norm(nn.Module):
    """RMS norm; its weight is seen in bfloat16."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norms the last axis in float32."""
        normed: Tensor = F.rms_norm(x, x.shape[-1:], seen(self.weight).to(x.dtype), self.eps)
        return normed


class Linear(nn.Module):
    """A product with a weight that is seen in bfloat16."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * gain * inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs) in x's type."""
        product: Tensor = F.linear(x, seen(self.weight).to(x.dtype))
        return product


def seen(weight: Tensor) -> Tensor:
    """A weight as bfloat16 holds it; the gradient passes through."""
    return weight.bfloat16()


class FeedForward(nn.Module):
    """SwiGLU: the dense first layer and the shared expert."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate)
        self.up_proj = Linear(hidden, intermediate)
        self.down_proj = Linear(intermediate, hidden, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) -> the same."""
        product: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return product
