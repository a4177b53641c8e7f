"""The mixture of experts of one layer: router, routed experts, shared expert. Knows nothing of attention."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from training.blocks import FeedForward, as_bfloat16
from training.quantize import round_to_int4
from training.shape import Shape

_MULTIPLE = 128  # an expert's rows are padded to a multiple of it: a product of a new shape costs more than padding


class _Dispatch(torch.autograd.Function):
    """The rows x[source]. Token t's copies are at slots[t], so its gradient is the sum of grad[slots[t]].

    This avoids the scatter that is the usual gradient of indexing.
    """

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, slots: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slots)
        return x[source]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (slots,) = ctx.saved_tensors
        return grad[slots].sum(1), None, None


class _CombineParts(torch.autograd.Function):
    """The rows x[slots]. No row is used twice, so the gradient is a copy without a sum."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slots)
        ctx.num_rows = len(x)
        return x[slots]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (slots,) = ctx.saved_tensors
        spread = grad.new_zeros(ctx.num_rows, grad.shape[-1])
        return spread.index_copy_(0, slots.flatten(), grad.flatten(0, 1)), None


def _sort_by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Return the position of each token's copies when the copies are sorted by expert.

    `chosen` is (tokens, top). Return source (positions,), the token at each position; slots (tokens, top), each token's
    positions; and each expert's number of positions, rounded up so that products have few different shapes. Positions
    without a copy compute token 0, and their result is not used.
    """
    flat = chosen.flatten()
    counts = torch.bincount(flat, minlength=num_experts)
    positions = (counts + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE
    order = flat.argsort(stable=True)
    shift = (positions.cumsum(0) - positions) - (counts.cumsum(0) - counts)
    slot_of_order = torch.arange(len(flat)) + shift[flat[order]]
    slots = torch.empty_like(flat).index_copy_(0, order, slot_of_order)
    source = flat.new_zeros(int(positions.sum())).index_copy_(0, slot_of_order, order // chosen.shape[1])
    return source, slots.view_as(chosen), positions.tolist()


class Experts(nn.Module):
    """The router, the routed experts (stacked) and the shared expert of one layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, inner, count = shape.hidden_size, shape.moe_intermediate_size, shape.n_routed_experts
        self.shape = shape
        self.router = nn.Parameter(torch.randn(count, hidden) * 0.3 * hidden**-0.5)
        self.correction_bias = nn.Buffer(torch.zeros(count))
        self.load = nn.Buffer(torch.zeros(count))  # tokens routed to each expert since the last reset
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * inner, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(count, hidden, inner) * 0.06 * inner**-0.5)
        self.shared_experts = FeedForward(hidden, inner)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Map (tokens, hidden) to the same shape. `real` (tokens,) marks non-padding tokens, which count as load."""
        top = self.shape.num_experts_per_tok
        scores = F.linear(x.float(), as_bfloat16(self.router).float()).sigmoid()
        chosen = (scores + self.correction_bias).topk(top, dim=-1).indices  # (tokens, top)
        weights = scores.gather(-1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.shape.routed_scaling_factor
        self.load.add_(torch.bincount(chosen[real].flatten(), minlength=len(self.load)))
        source, slots, positions = _sort_by_expert(chosen, self.shape.n_routed_experts)
        gate_up_projs = self._rounded(self.gate_up_proj).to(x.dtype).unbind()
        down_projs = self._rounded(self.down_proj).to(x.dtype).unbind()
        parts = []
        sorted_rows = _Dispatch.apply(x, source, slots).split(positions)
        for rows, gate_up_proj, down_proj in zip(sorted_rows, gate_up_projs, down_projs, strict=True):
            gate, up = F.linear(rows, gate_up_proj).chunk(2, dim=-1)
            parts.append(F.linear(F.silu(gate) * up, down_proj))
        routed = _CombineParts.apply(torch.cat(parts), slots)  # (tokens, top, hidden)
        out: Tensor = (routed * weights.unsqueeze(-1).to(x.dtype)).sum(1) + self.shared_experts(x)
        return out

    @torch.no_grad()
    def freeze(self, is_quantized: bool) -> None:
        """Round the routed experts in place for eval mode: to INT4 as exported, or to bfloat16 for comparison."""
        for weight in (self.gate_up_proj, self.down_proj):
            weight.copy_(round_to_int4(weight) if is_quantized else as_bfloat16(weight))

    def _rounded(self, weight: Tensor) -> Tensor:
        return round_to_int4(weight) if self.training else weight
