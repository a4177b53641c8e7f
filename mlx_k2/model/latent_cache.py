"""The latent cache: for each layer and slot, the rows that attention reads. Knows no sequences.

A row is one position of one layer: the normed latent (kv_lora_rank values) and the rotated part of the key (qk_rope
values), together 576 in K2, shared by all heads. To undo positions, write at an earlier one: attention never reads rows
at or after the end of the span that was written last.
"""

import mlx.core as mx

from mlx_k2.model.batch import Span

SMALLEST_CAPACITY = 256
"""Smallest number of rows of a slot's first array. The capacity doubles as the sequence grows, up to the context."""


class LatentCache:
    """Rows of ``num_layers`` layers and ``num_slots`` slots, up to ``context_tokens`` rows per slot."""

    def __init__(self, num_layers: int, num_slots: int, context_tokens: int, row_dim: int, dtype: mx.Dtype) -> None:
        self._context_tokens = context_tokens
        self._row_dim = row_dim
        self.dtype = dtype
        self._arrays: list[list[mx.array | None]] = [[None] * num_slots for _ in range(num_layers)]  # by layer, slot

    def write(self, layer: int, span: Span, cache_rows: mx.array) -> mx.array:
        """Write ``cache_rows`` (count, row_dim) at the span's position. Return the slot's rows, (span.end, row_dim)."""
        array = self._array_with(layer, span.slot, span.end)
        array[span.position : span.end] = cache_rows  # in place when evaluated, because nothing else references it
        self._arrays[layer][span.slot] = array
        return array[: span.end]

    def rows(self, layer: int, span: Span) -> mx.array:
        """Return the rows of a span that was written before, (count, row_dim)."""
        array = self._arrays[layer][span.slot]
        assert array is not None, f"slot {span.slot} was never written"
        return array[span.position : span.end]

    def copy(self, source: int, target: int, num_rows: int) -> None:
        """Copy the first ``num_rows`` rows of slot ``source`` to slot ``target``, in every layer."""
        for layer, slot_arrays in enumerate(self._arrays):
            source_array = slot_arrays[source]
            assert source_array is not None, f"slot {source} was never written"
            target_array = self._array_with(layer, target, num_rows)
            target_array[:num_rows] = source_array[:num_rows]
            slot_arrays[target] = target_array

    @property
    def arrays(self) -> list[mx.array]:
        """All allocated arrays after their last writes. Evaluating them completes all writes."""
        return [array for slot_arrays in self._arrays for array in slot_arrays if array is not None]

    def _array_with(self, layer: int, slot: int, num_rows: int) -> mx.array:
        """Return the slot's array, or a longer copy of it if it has fewer than ``num_rows`` rows."""
        array = self._arrays[layer][slot]
        old_capacity = 0 if array is None else array.shape[0]
        if array is not None and old_capacity >= num_rows:
            return array
        capacity = max(SMALLEST_CAPACITY, 2 * old_capacity)
        while capacity < num_rows:
            capacity *= 2
        capacity = max(num_rows, min(capacity, self._context_tokens))
        new_rows = mx.zeros((capacity - old_capacity, self._row_dim), self.dtype)
        return new_rows if array is None else mx.concatenate([array, new_rows])
