"""The latent cache: for each layer and slot, the rows that attention reads. Knows no sequences.

A row is one position of one layer: the normed latent (kv_lora_rank) and the rotated key part (qk_rope), 576 values in
K2, shared by all heads. Writing at an earlier position undoes rows: those at and after a step's end are never read.
"""

import mlx.core as mx

from mlx_k2.model.batch import Span

SMALLEST_CAPACITY = 256
"""Rows of a slot's first allocation. The allocation doubles as the sequence grows, up to the context size."""


class LatentCache:
    """Rows of ``num_layers`` layers and ``num_slots`` slots, up to ``context_tokens`` rows per slot."""

    def __init__(self, num_layers: int, num_slots: int, context_tokens: int, row_dim: int, dtype: mx.Dtype) -> None:
        self._context_tokens = context_tokens
        self._row_dim = row_dim
        self.dtype = dtype
        self._cache_rows: list[list[mx.array | None]] = [[None] * num_slots for _ in range(num_layers)]

    def write(self, layer: int, span: Span, cache_rows: mx.array) -> mx.array:
        """Write ``cache_rows`` (count, row_dim) at the span's position. Return the slot's rows, (span.end, row_dim)."""
        cached = self._at_least(layer, span.slot, span.end)
        cached[span.position : span.end] = cache_rows  # in place when evaluated, because nothing else references it
        self._cache_rows[layer][span.slot] = cached
        return cached[: span.end]

    def written(self, layer: int, span: Span) -> mx.array:
        """Return the rows of a span that was written before, (count, row_dim)."""
        cached = self._cache_rows[layer][span.slot]
        assert cached is not None, "the span was written"
        return cached[span.position : span.end]

    def copy(self, source: int, target: int, num_rows: int) -> None:
        """Copy the first ``num_rows`` rows of slot ``source`` to slot ``target``, in every layer."""
        for layer, slots in enumerate(self._cache_rows):
            cache_rows = slots[source]
            assert cache_rows is not None, f"slot {source} holds nothing to copy"
            copied = self._at_least(layer, target, num_rows)
            copied[:num_rows] = cache_rows[:num_rows]
            slots[target] = copied

    @property
    def arrays(self) -> list[mx.array]:
        """All allocated arrays after their last writes. Evaluating them completes all writes."""
        return [cached for slots in self._cache_rows for cached in slots if cached is not None]

    def _at_least(self, layer: int, slot: int, num_rows: int) -> mx.array:
        """Return the slot's array, grown if it has fewer than ``num_rows`` rows. Do not store it."""
        cached = self._cache_rows[layer][slot]
        capacity = 0 if cached is None else cached.shape[0]
        if cached is not None and capacity >= num_rows:
            return cached
        grown = max(SMALLEST_CAPACITY, 2 * capacity)
        while grown < num_rows:
            grown *= 2
        grown = max(num_rows, min(grown, self._context_tokens))
        added = mx.zeros((grown - capacity, self._row_dim), self.dtype)
        return added if cached is None else mx.concatenate([cached, added])
