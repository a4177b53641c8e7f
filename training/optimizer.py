"""Muon for the matrices and AdamW for the rest, as in K2's training. Knows nothing of data or schedules."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from training.model import Model

_MOMENTUM = 0.95
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with an orthogonalized update. A weight with three axes is a stack of matrices."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every weight from its gradient. Orthogonalize weights of equal shapes together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                updates = orthogonal(torch.stack([self._momentum(parameter) for parameter in parameters]))
                size = max(1.0, updates.shape[-2] / updates.shape[-1]) ** 0.5 * group["lr"]
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.sub_(update, alpha=size)

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - _MOMENTUM)
        return parameter.grad.lerp(state["momentum"], _MOMENTUM)


def orthogonal(matrices: Tensor) -> Tensor:
    """Return roughly the nearest orthogonal matrices: five Newton-Schulz steps in bfloat16 (Jordan, Muon, 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    shape = matrices.shape
    x = matrices.flatten(0, -3)
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    is_tall = shape[-2] > shape[-1]
    if is_tall:
        x = x.mT.contiguous()
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).float().view(shape)


def optimizers(model: Model, matrix_lr: float, other_lr: float) -> tuple[Muon, torch.optim.AdamW]:
    """Return Muon for all matrices inside the layers, and AdamW for embedding, head, router and norms."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = name.startswith("layers.") and parameter.ndim > 1 and not name.endswith("router")
        (matrices if is_matrix else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    return Muon(matrices, matrix_lr), adam
