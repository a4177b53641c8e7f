"""The tokens that travel together in one step, as the layers see them. Knows no requests and no token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx


@dataclass(frozen=True)
class Span:
    """Consecutive positions of one sequence: ``count`` of them from ``position`` on, cached in ``slot``.

    Prompt positions are computed naive, generated ones absorbed (model/attention.py); which of the two follows from
    the sequence alone, never from the company a token travels in.
    """

    slot: int
    position: int
    count: int
    is_prompt: bool

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.position + self.count


class Batch:
    """Spans laid one after the other, those of generated tokens first.

    ``key_alignment``: attention sees keys padded with zeros to a multiple of this. On a CPU it makes every sum over
    keys run in the same order whatever chunk a position travels in; a GPU needs none (1).
    """

    def __init__(self, spans: Sequence[Span], key_alignment: int) -> None:
        assert spans, "a step without tokens"
        kinds = [span.is_prompt for span in spans]
        assert kinds == sorted(kinds), "generated tokens come before prompt tokens"
        self.spans = tuple(spans)
        self.num_tokens = sum(span.count for span in spans)
        self.num_generated = sum(span.count for span in spans if not span.is_prompt)
        self._key_alignment = key_alignment

    @cached_property
    def positions(self) -> mx.array:
        """The position of each token: (tokens,) int32."""
        return mx.concatenate([mx.arange(span.position, span.end, dtype=mx.int32) for span in self.spans])

    def num_keys(self, span: Span) -> int:
        """How many cached rows ``span`` attends to, padding included."""
        return -(-span.end // self._key_alignment) * self._key_alignment

    @cached_property
    def starts(self) -> tuple[mx.array, ...]:
        """Where each span's rows go in its cache: (1,) int32 each; made once for all layers."""
        return tuple(mx.array([span.position], dtype=mx.int32) for span in self.spans)

    @cached_property
    def masks(self) -> tuple[mx.array | None, ...]:
        """What is added to each span's scores: (count, keys) float32, 0 where a key may be seen, else -inf.

        None where every key may be seen: one token, no padding.
        """
        return tuple(self._mask(span) for span in self.spans)

    def _mask(self, span: Span) -> mx.array | None:
        num_keys = self.num_keys(span)
        if span.count == 1 and num_keys == span.end:
            return None
        queries = mx.arange(span.position, span.end)[:, None]
        return mx.where(mx.arange(num_keys) <= queries, 0.0, -mx.inf)
