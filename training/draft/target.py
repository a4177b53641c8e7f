"""The built-in model in float32 for batches of padded rows, by mlx-lm. Knows nothing of heads or prompts.

Routed experts are dequantized, and each multiplies its tokens together: on a CPU that is faster than the products with
quantized weights, token by token.
"""

import itertools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.cache import BatchKVCache
from mlx_lm.utils import load_model

from mlx_k2.builtin import BUILTIN_FOLDER


class _GroupedExperts(nn.Module):
    """The chosen experts' outputs (rows, tokens, chosen, hidden). Each expert computes its tokens in one product."""

    def __init__(self, quantized: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            mx.contiguous(
                mx.dequantize(part.weight, part.scales, part.biases, part.group_size, part.bits).swapaxes(-1, -2)
            )
            for part in (quantized.gate_proj, quantized.up_proj, quantized.down_proj)
        )

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """Return the outputs of the experts ``chosen`` (rows, tokens, chosen) for x (rows, tokens, hidden)."""
        ids = np.asarray(chosen).ravel()
        order = np.argsort(ids, kind="stable")
        ends = np.cumsum(np.bincount(ids, minlength=len(self.gate)))
        tokens = x.reshape(-1, x.shape[-1])[mx.array(order // chosen.shape[-1])]
        outputs = []
        for expert, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
            part = tokens[start:end]
            inner = nn.silu(part @ self.gate[expert]) * (part @ self.up[expert])
            outputs.append(inner @ self.down[expert])
        return mx.concatenate(outputs)[mx.array(np.argsort(order))].reshape(*chosen.shape, -1)


class Target:
    """The model with caches for one batch. It returns its last layer's output and the outputs of ``aux_layers``."""

    def __init__(self, aux_layers: Sequence[int]) -> None:
        self._model, _ = load_model(BUILTIN_FOLDER)
        self._model.set_dtype(mx.float32)
        for layer in self._model.model.layers[1:]:  # the first layer is dense
            layer.mlp.switch_mlp = _GroupedExperts(layer.mlp.switch_mlp)
        mx.eval(self._model.parameters())
        self._aux_layers = frozenset(aux_layers)
        self._caches: list[BatchKVCache] = []

    def start(self, left_padding: Sequence[int]) -> None:
        """Empty the caches for a batch of rows; ``left_padding``: the number of padding tokens before each row."""
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
