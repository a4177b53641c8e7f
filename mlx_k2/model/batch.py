"""The positions of one step, as the layers process them. Knows no requests and no token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx


@dataclass(frozen=True)
class Span:
    """Consecutive positions of one sequence: ``count`` positions starting at ``position``, cached in ``slot``.

    Prompt positions use naive attention, generated ones absorbed attention (attention.py). So the other sequences of a
    step have no influence on the form.
    """

    slot: int
    position: int
    count: int
    is_prompt: bool

    @property
    def end(self) -> int:
        """Position after the last one."""
        return self.position + self.count


class Batch:
    """The spans of one step, those of generated tokens first. A slot has at most one span."""

    def __init__(self, spans: Sequence[Span]) -> None:
        assert spans, "a step without tokens"
        are_prompts = [span.is_prompt for span in spans]
        assert are_prompts == sorted(are_prompts), "generated tokens come before prompt tokens"
        assert len({span.slot for span in spans}) == len(spans), "two spans in one slot"
        self.spans = tuple(spans)
        self.num_tokens = sum(span.count for span in spans)
        self.num_generated = sum(span.count for span in spans if not span.is_prompt)

    @cached_property
    def positions(self) -> mx.array:
        """Position of each token: (tokens,) int32."""
        return mx.array([position for span in self.spans for position in range(span.position, span.end)], mx.int32)
