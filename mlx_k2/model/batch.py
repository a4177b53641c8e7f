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
    """Spans laid one after the other, those of generated tokens first."""

    def __init__(self, spans: Sequence[Span]) -> None:
        assert spans, "a step without tokens"
        kinds = [span.is_prompt for span in spans]
        assert kinds == sorted(kinds), "generated tokens come before prompt tokens"
        assert len({span.slot for span in spans}) == len(spans), "two spans in one slot"
        self.spans = tuple(spans)
        self.num_tokens = sum(span.count for span in spans)
        self.num_generated = sum(span.count for span in spans if not span.is_prompt)

    @cached_property
    def positions(self) -> mx.array:
        """The position of each token: (tokens,) int32."""
        return mx.array([position for span in self.spans for position in range(span.position, span.end)], mx.int32)
