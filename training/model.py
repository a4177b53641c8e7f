"""Kimi K2's architecture in torch, for training. Knows nothing of text, data or files."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from training.attention import Attention, Cache
from training.blocks import FeedForward, Linear, Norm, as_bfloat16
from training.experts import Experts
from training.rope import yarn_frequencies
from training.shape import Shape


class Layer(nn.Module):
    """One decoder layer. Layer 0 has a dense feed-forward, all others have experts."""

    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = FeedForward(shape.hidden_size, shape.intermediate_size) if index == 0 else Experts(shape)


class Model(nn.Module):
    """The whole model. `hidden` maps token ids to hidden states, and `lm_head` maps these to logits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        # A component shared by all tokens lets attention use positions before it has learned any content.
        shared = torch.randn(shape.hidden_size) * 0.7
        self.embed_tokens = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden_size) * 0.5 + shared)
        self.layers = nn.ModuleList(Layer(shape, index) for index in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = Linear(shape.hidden_size, shape.vocab_size, gain=0.5)
        self.frequencies = nn.Buffer(yarn_frequencies(shape), persistent=False)

    def hidden(
        self,
        tokens: Tensor,
        real: Tensor,
        positions: Tensor | None = None,
        caches: list[Cache] | None = None,
        space: int = 0,
    ) -> Tensor:
        """Map ids (rows, new) to normalized hidden states (rows, new, hidden). `real` marks ids that are not padding.

        `positions` (rows, new), `caches` and their number of positions `space` are for decoding; by default, rows start
        at position 0 and nothing is cached.
        In training mode, routed experts are rounded to INT4 and products are in bfloat16. Otherwise all is float32.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        angles = positions.unsqueeze(-1) * self.frequencies  # (rows, new, rope / 2)
        kind = torch.bfloat16 if self.training else torch.float32
        x = F.embedding(tokens, as_bfloat16(self.embed_tokens).float())
        for index, layer in enumerate(self.decoder_layers()):
            cache = None if caches is None else caches[index]
            normed = layer.input_layernorm(x).to(kind)
            x = x + layer.self_attn(normed, angles, positions, cache, space)
            normed = layer.post_attention_layernorm(x).to(kind)
            if isinstance(layer.mlp, Experts):
                x = x + layer.mlp(normed.flatten(0, 1), real.flatten()).view_as(x)
            else:
                x = x + layer.mlp(normed)
        hidden: Tensor = self.norm(x).to(kind)
        return hidden

    def decoder_layers(self) -> list[Layer]:
        """Return the layers, first to last."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def experts(self) -> list[Experts]:
        """Return the experts of the layers that have them, first to last."""
        return [layer.mlp for layer in self.decoder_layers() if isinstance(layer.mlp, Experts)]
