"""Microbatch: the tokens that travel together in one step. The scheduler creates it, the coordinator sends it."""

from dataclasses import dataclass
from functools import cached_property

import msgspec

from mlx_k2.sampling import LogitBias, Sampling
from mlx_k2.scheduling.cost_model import StepLoad, row_load
from mlx_k2.scheduling.sequence import Sequence
from mlx_k2.token_mask import TokenMask


class DraftRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Request for ``num_tokens`` drafts after the token that a row samples. The last stage answers with Drafted.

    The penalties are the request's. The row's ``logit_bias`` was made before the token was sampled, so it lacks the
    penalty of this token.
    """

    num_tokens: int
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sequence's part of a step, as the stages receive it: ``token_ids`` from ``position`` on, in ``slot``.

    ``is_prompt`` selects the attention method: naive for prompt tokens, absorbed for generated and draft tokens.
    If ``sampling`` is set, a token is sampled after the last of ``token_ids``; the repetition penalty reads
    ``recent_ids``. If ``copy_from`` is set, all positions before ``position`` are first copied from that slot, in the
    state in which all earlier plans left them. ``token_mask`` limits the token that is sampled, ``logit_bias`` changes
    its logits; only the last stage's copy has them. ``draft`` requests drafts after the sampled token; without it the
    draft head only writes its cache. ``is_draft``: the row's one token is a draft. A stage skips a draft row that it
    knows to be wrong: a later plan for the slot starts at the row's position or before it, or, on the last stage,
    another token was sampled for the position.
    """

    slot: int
    position: int
    token_ids: tuple[int, ...]
    is_prompt: bool
    sampling: Sampling | None
    recent_ids: tuple[int, ...] = ()
    copy_from: int | None = None
    token_mask: TokenMask | None = None
    logit_bias: LogitBias | None = None
    draft: DraftRequest | None = None
    is_draft: bool = False

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.position + len(self.token_ids)

    @property
    def needs_logits(self) -> bool:
        """True if a token is sampled after the last token of the row."""
        return self.sampling is not None


@dataclass(frozen=True)
class PlannedRow:
    """A row and the sequence that receives the token sampled for it."""

    sequence: Sequence
    row: Row

    @classmethod
    def of(
        cls, sequence: Sequence, token_ids: tuple[int, ...], *, copy_from: int | None = None, is_draft: bool = False
    ) -> "PlannedRow":
        """Return a row with ``token_ids`` after the planned tokens of ``sequence``.

        They are either all prompt tokens or none is. If no known token follows them, the next token is sampled.
        """
        assert sequence.slot is not None, "a waiting sequence is not planned"
        position = sequence.num_planned
        end, is_prompt = position + len(token_ids), position < sequence.num_prompt
        row = Row(sequence.slot, position, token_ids, is_prompt, sampling=None, copy_from=copy_from, is_draft=is_draft)
        if end >= len(sequence.token_ids):
            row = msgspec.structs.replace(
                row,
                sampling=sequence.sampling,
                recent_ids=sequence.recent_ids(end),
                token_mask=sequence.token_mask(end),
                logit_bias=sequence.logit_bias(end),
            )
        return cls(sequence, row)

    def with_draft_request(self, num_tokens: int) -> "PlannedRow":
        """Return the row with a request for ``num_tokens`` drafts after the token that it samples."""
        sampling = self.sequence.request.sampling
        draft = DraftRequest(num_tokens, sampling.presence_penalty, sampling.frequency_penalty)
        return PlannedRow(self.sequence, msgspec.structs.replace(self.row, draft=draft))

    @property
    def load(self) -> StepLoad:
        """The work of this row on every stage."""
        row = self.row
        return row_load(row.position, len(row.token_ids), is_prompt=row.is_prompt, needs_logits=row.needs_logits)


@dataclass(frozen=True)
class Microbatch:
    """The rows of one step: first rows of generated or draft tokens, then rows of prompt tokens."""

    number: int
    rows: tuple[PlannedRow, ...]

    @property
    def decodes(self) -> bool:
        """True if the step carries generated or draft tokens."""
        return not self.rows[0].row.is_prompt

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all rows."""
        return self.load.num_tokens

    @cached_property
    def load(self) -> StepLoad:
        """The work of this step on every stage."""
        return sum((planned.load for planned in self.rows), StepLoad())
