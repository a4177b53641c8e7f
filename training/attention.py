"""Multi-head latent attention, and a cache for decoding. Knows nothing of a layer's feed-forward part."""

import math

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from training.blocks import Linear, Norm
from training.rope import rotate, softmax_scale
from training.shape import Shape

_LORA_NORM_EPS = 1e-6


class Cache:
    """The keys and values of one layer for a batch whose rows have different lengths."""

    def __init__(self) -> None:
        self.key = self.value = torch.empty(0)

    def extend(self, key: Tensor, value: Tensor, positions: Tensor, space: int) -> tuple[Tensor, Tensor]:
        """Write (rows, heads, new, dim) at positions (rows, new). Return keys and values of all `space` positions."""
        if not self.key.numel():
            self.key = key.new_zeros(*key.shape[:2], space, key.shape[3])
            self.value = value.new_zeros(*value.shape[:2], space, value.shape[3])
        rows = torch.arange(len(positions)).unsqueeze(1)
        self.key[rows, :, positions] = key.transpose(1, 2)
        self.value[rows, :, positions] = value.transpose(1, 2)
        return self.key, self.value


class Attention(nn.Module):
    """Multi-head latent attention, computed in the naive way (without absorption)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        hidden, heads = shape.hidden_size, shape.num_attention_heads
        key_dim = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        self.q_a_proj = Linear(hidden, shape.q_lora_rank)
        self.q_a_layernorm = Norm(shape.q_lora_rank, _LORA_NORM_EPS)
        self.q_b_proj = Linear(shape.q_lora_rank, heads * key_dim, gain=0.25)
        self.kv_a_proj_with_mqa = Linear(hidden, shape.kv_lora_rank + shape.qk_rope_head_dim)
        self.kv_a_layernorm = Norm(shape.kv_lora_rank, _LORA_NORM_EPS)
        self.kv_b_proj = Linear(shape.kv_lora_rank, heads * (shape.qk_nope_head_dim + shape.v_head_dim))
        self.o_proj = Linear(heads * shape.v_head_dim, hidden, gain=0.6)
        self.scale = softmax_scale(shape)

    def forward(self, x: Tensor, angles: Tensor, positions: Tensor, cache: Cache | None, space: int) -> Tensor:
        """Map (rows, new, hidden) to the same shape. Each token sees the positions up to its own.

        With a cache, of `space` positions, these include the positions of earlier calls.
        """
        shape, (rows, new, _) = self.shape, x.shape
        nope, rope = shape.qk_nope_head_dim, shape.qk_rope_head_dim
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (-1, nope + rope)).transpose(1, 2)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((shape.kv_lora_rank, rope), dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (-1, nope + shape.v_head_dim)).transpose(1, 2)
        k_nope, v = kv.split((nope, shape.v_head_dim), dim=-1)
        q_nope, q_rope = q.split((nope, rope), dim=-1)
        angles = angles.unsqueeze(1)  # (rows, 1, new, rope / 2)
        q = torch.cat((q_nope, rotate(q_rope, angles)), dim=-1)
        k_rope = rotate(k_rope.unsqueeze(1), angles).expand(-1, shape.num_attention_heads, -1, -1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        if cache is None:
            mixed = _causal_attention(q, k, v, self.scale)
        else:
            k, v = cache.extend(k, v, positions, space)
            visible = torch.arange(space) <= positions.unsqueeze(-1)  # (rows, new, space)
            mixed = F.scaled_dot_product_attention(q, k, v, visible.unsqueeze(1), scale=self.scale)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(rows, new, -1))
        return out


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    rows, heads, length, _ = q.shape
    mask = torch.full((length, length), -math.inf, dtype=q.dtype).triu(1).expand(rows * heads, -1, -1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)
    mixed: Tensor = (weights @ v).unflatten(0, (rows, heads))
    return mixed
