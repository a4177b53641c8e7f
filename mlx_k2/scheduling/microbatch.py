"""The tokens that travel together in one step: values that the scheduler decides and the coordinator sends."""

from dataclasses import dataclass
from functools import cached_property

import msgspec

from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.cost_model import StepLoad, row_load
from mlx_k2.scheduling.sequence import Sequence


class Row(msgspec.Struct, frozen=True):
    """One sequence's part of a step, as stages receive it: ``token_ids`` at ``position`` and after, in ``slot``.

    ``is_prompt`` selects how the positions are computed: prompt tokens naive, generated and draft tokens absorbed.
    ``sampling`` asks for a token after the last of them; ``recent_ids`` are the tokens that its repetition penalty
    reads. ``copy_from`` is the slot from which all positions before ``position`` are copied first, as all earlier
    plans left them.
    """

    slot: int
    position: int
    token_ids: tuple[int, ...]
    is_prompt: bool
    sampling: Sampling | None
    recent_ids: tuple[int, ...] = ()
    copy_from: int | None = None

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.position + len(self.token_ids)

    @property
    def needs_logits(self) -> bool:
        """Whether a token is sampled after the last token of the row."""
        return self.sampling is not None


@dataclass(frozen=True)
class PlannedRow:
    """A row and the sequence that receives the token sampled for it."""

    sequence: Sequence
    row: Row

    @classmethod
    def of(
        cls,
        sequence: Sequence,
        position: int,
        token_ids: tuple[int, ...],
        *,
        is_prompt: bool,
        needs_logits: bool,
        copy_from: int | None = None,
    ) -> "PlannedRow":
        """Plan ``token_ids`` of ``sequence`` from ``position`` on: all of the prompt, or all generated or draft tokens.

        ``needs_logits``: they are all tokens that are known or drafted so far, so the next one is sampled.
        """
        sampling = sequence.request.sampling if needs_logits else None
        recent_ids = sequence.recent_ids(position + len(token_ids)) if needs_logits else ()
        return cls(sequence, Row(sequence.slot, position, token_ids, is_prompt, sampling, recent_ids, copy_from))

    @property
    def load(self) -> StepLoad:
        """The work of this row on every stage."""
        row = self.row
        return row_load(row.position, len(row.token_ids), is_prompt=row.is_prompt, needs_logits=row.needs_logits)


@dataclass(frozen=True)
class Microbatch:
    """The rows of one step, those of generated tokens first."""

    number: int
    rows: tuple[PlannedRow, ...]

    @property
    def decodes(self) -> bool:
        """Whether the step carries generated tokens."""
        return not self.rows[0].row.is_prompt

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows."""
        return self.load.num_tokens

    @cached_property
    def load(self) -> StepLoad:
        """The work of this step on every stage."""
        return sum((planned.load for planned in self.rows), StepLoad())
