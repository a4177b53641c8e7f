"""Drafts of one sequence: those in plans, those that the draft head proposed and no plan has yet, and their counts.

Knows no text, no plans and no other sequence.
"""

import enum
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlx_k2.scheduling.draft_switch import EXPECTED_ACCEPTANCE
from mlx_k2.scheduling.drafter import DraftMode, NgramDrafter

_MIN_MATCH_TOKENS = 4  # length of the n-gram that must match for its draft to be used instead of the draft head's
_FADE = 0.95
"""Factor on a draft's weight in its source's acceptance after each later draft: about the last 20 drafts count."""


class DraftSource(enum.Enum):
    """Source of a draft token."""

    NGRAM = "ngram"
    MODEL = "model"


@dataclass(frozen=True)
class DraftCount:
    """Numbers of drafts of one source and position."""

    source: DraftSource
    position: int
    """Distance in tokens from the last known token when the draft was planned, at least 1."""
    num_drafted: int
    num_accepted: int


def merge_counts(counts: Iterable[DraftCount]) -> tuple[DraftCount, ...]:
    """Return the sums of the counts of each source and position, ordered by source, then by position."""
    drafted: Counter[tuple[str, int]] = Counter()
    accepted: Counter[tuple[str, int]] = Counter()
    for count in counts:
        key = count.source.value, count.position
        drafted[key] += count.num_drafted
        accepted[key] += count.num_accepted
    return tuple(
        DraftCount(DraftSource(source), position, drafted[source, position], accepted[source, position])
        for source, position in sorted(drafted)
    )


@dataclass(frozen=True)
class Draft:
    """A draft token, its source, and its position, both as in DraftCount."""

    token_id: int
    source: DraftSource
    position: int
    ngram_id: int | None
    """The draft of a matching n-gram for the same position; None if there is none."""


class _Acceptance:
    """Fraction of a source's drafts that are right. It starts at ``expected``, with the weight of four drafts."""

    def __init__(self, expected: float) -> None:
        self._num_right, self._num_drafts = 4 * expected, 4.0

    def add(self, is_right: bool) -> None:
        self._num_right = self._num_right * _FADE + (1 if is_right else 0)
        self._num_drafts = self._num_drafts * _FADE + 1

    @property
    def rate(self) -> float:
        return self._num_right / self._num_drafts


class Drafts:
    """Drafts after the known tokens of a sequence: first those in plans, then those that the draft head proposed."""

    def __init__(self, mode: DraftMode) -> None:
        self._mode = mode
        self._in_plans: deque[Draft] = deque()
        self._proposed_ids: deque[int] = deque()
        self._num_drafted: Counter[tuple[DraftSource, int]] = Counter()
        self._num_accepted: Counter[tuple[DraftSource, int]] = Counter()
        # 0.5 < EXPECTED_ACCEPTANCE: at first the head's drafts are preferred.
        self._acceptance = {DraftSource.MODEL: _Acceptance(EXPECTED_ACCEPTANCE), DraftSource.NGRAM: _Acceptance(0.5)}

    @property
    def planned_ids(self) -> list[int]:
        """The tokens of the drafts that are in plans, before the tokens at their positions are known."""
        return [draft.token_id for draft in self._in_plans]

    @property
    def counts(self) -> tuple[DraftCount, ...]:
        """The counts of each source and position that occurred."""
        return tuple(
            DraftCount(source, position, num_drafted, self._num_accepted[source, position])
            for (source, position), num_drafted in self._num_drafted.items()
        )

    def propose(self, token_ids: Sequence[int]) -> None:
        """Store the draft head's tokens after the known ones, unless they differ from the drafts in plans."""
        planned_ids = self.planned_ids
        is_usable = list(token_ids[: len(planned_ids)]) == planned_ids
        self._proposed_ids = deque(token_ids[len(planned_ids) :] if is_usable else ())

    def next(self, known_ids: Sequence[int], drafter: NgramDrafter) -> Draft | None:
        """Return the draft for the position after the known tokens and all drafts in plans; None if there is none."""
        position = len(self._in_plans) + 1
        ngram_id = None
        if self._mode is not DraftMode.MODEL:
            min_tokens = 0 if self._mode is DraftMode.NGRAM else _MIN_MATCH_TOKENS
            ngram_id = drafter.draft(known_ids, self.planned_ids, min_tokens)
        ngram_rate, model_rate = self._acceptance[DraftSource.NGRAM].rate, self._acceptance[DraftSource.MODEL].rate
        if ngram_id is not None and (self._mode is DraftMode.NGRAM or ngram_rate > model_rate):
            return Draft(ngram_id, DraftSource.NGRAM, position, ngram_id)
        return Draft(self._proposed_ids[0], DraftSource.MODEL, position, ngram_id) if self._proposed_ids else None

    def plan(self, draft: Draft) -> None:
        """Record that ``draft``, the result of ``next``, is in a plan."""
        self._in_plans.append(draft)
        self._num_drafted[draft.source, draft.position] += 1
        self._drop_proposed(draft.token_id)

    def accept(self, token_id: int) -> bool:
        """Return whether the first draft in a plan, if any, is this token. Drop the drafts that cannot follow it."""
        if not self._in_plans:
            self._drop_proposed(token_id)
            return False
        draft = self._in_plans.popleft()
        is_right = draft.token_id == token_id
        self._acceptance[draft.source].add(is_right)
        if draft.source is DraftSource.MODEL and draft.ngram_id is not None:
            self._acceptance[DraftSource.NGRAM].add(draft.ngram_id == token_id)
        if is_right:
            self._num_accepted[draft.source, draft.position] += 1
        else:
            self.clear()
        return is_right

    def clear(self) -> None:
        """Drop all drafts. Keep the counts."""
        self._in_plans.clear()
        self._proposed_ids.clear()

    def _drop_proposed(self, token_id: int) -> None:
        """Drop the first proposed token, whose position has ``token_id`` now, and all others if it differs."""
        if self._proposed_ids and self._proposed_ids.popleft() != token_id:
            self._proposed_ids.clear()
