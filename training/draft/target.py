"""The built-in model in float32 for batches of padded rows, by mlx-lm. Knows nothing of heads or prompts.

Routed experts are dequantized and all of them computed for every token: on a CPU that is faster than the products with
quantized weights, token by token.
"""

from collections.abc import Sequence

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import BatchKVCache
from mlx_lm.utils import load_model

from mlx_k2.builtin import BUILTIN_FOLDER


class _AllExperts(nn.Module):
    """The chosen experts' outputs (rows, tokens, chosen, hidden), picked from the outputs of all experts."""

    def __init__(self, quantized: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            mx.dequantize(part.weight, part.scales, part.biases, part.group_size, part.bits).swapaxes(-1, -2)
            for part in (quantized.gate_proj, quantized.up_proj, quantized.down_proj)
        )

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """Return the outputs of the experts ``chosen`` (rows, tokens, chosen) for x (rows, tokens, hidden)."""
        tokens = x.reshape(-1, x.shape[-1])
        outputs = (nn.silu(tokens @ self.gate) * (tokens @ self.up)) @ self.down  # (experts, tokens, hidden)
        outputs = outputs.swapaxes(0, 1).reshape(*x.shape[:2], -1, x.shape[-1])
        return mx.take_along_axis(outputs, chosen[..., None], axis=2)


class Target:
    """The model, its last layer's output, and the outputs of ``aux_layers`` beside it."""

    def __init__(self, aux_layers: Sequence[int]) -> None:
        self._model, _ = load_model(BUILTIN_FOLDER)
        self._model.set_dtype(mx.float32)
        for layer in self._model.model.layers[1:]:
            layer.mlp.switch_mlp = _AllExperts(layer.mlp.switch_mlp)
        mx.eval(self._model.parameters())
        self._aux_layers = frozenset(aux_layers)
        self._caches: list[BatchKVCache] = []

    def start(self, left_padding: Sequence[int]) -> None:
        """Begin a batch of rows, each with so many tokens before it that do not count."""
        self._caches = [BatchKVCache(list(left_padding)) for _ in self._model.model.layers]

    def run(self, token_ids: mx.array) -> tuple[mx.array, mx.array]:
        """Run the next tokens (rows, tokens). Return the aux states side by side, and the last layer's output."""
        hidden = self._model.model.embed_tokens(token_ids)
        mask = self._caches[0].make_mask(token_ids.shape[1], return_array=True)
        aux = []
        for index, (layer, cache) in enumerate(zip(self._model.model.layers, self._caches, strict=True)):
            hidden = layer(hidden, mask, cache)
            if index in self._aux_layers:
                aux.append(hidden)
        return mx.concatenate(aux, axis=-1), hidden

    def logits(self, last: mx.array) -> mx.array:
        """Return the logits (..., vocabulary) of the last layer's output."""
        return self._model.lm_head(self._model.model.norm(last))

    @property
    def embedding(self) -> mx.array:
        """The embedding (vocabulary, hidden)."""
        return self._model.model.embed_tokens.weight

    @property
    def head(self) -> mx.array:
        """The output projection (vocabulary, hidden)."""
        return self._model.lm_head.weight
