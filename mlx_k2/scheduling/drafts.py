"""Drafts of one sequence: those in plans, those of the draft head that no plan has yet, and counts of both sources.

Knows no text, no plans and no other sequence.
"""

import enum
from collections import Counter, deque
from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from mlx_k2.scheduling.drafter import DraftMode, NgramDrafter

_CERTAIN_LENGTH = 4
"""Tokens that must match for an n-gram to win over the draft head."""
_FADE = 0.95
"""Factor on a draft's weight in its source's acceptance after each later draft: about the last 20 count."""


class DraftSource(enum.Enum):
    """Source of a draft token."""

    NGRAM = "ngram"
    MODEL = "model"


@dataclass(frozen=True)
class DraftCount:
    """Drafts of one source that were ``position`` tokens, at least 1, after the last known one when they were sent."""

    source: DraftSource
    position: int
    num_drafted: int
    num_accepted: int


def merge_counts(counts: Iterable[DraftCount]) -> tuple[DraftCount, ...]:
    """Return the sums of the counts of each source and position, in the order of position."""
    drafted: Counter[tuple[int, DraftSource]] = Counter()
    accepted: Counter[tuple[int, DraftSource]] = Counter()
    for count in counts:
        drafted[count.position, count.source] += count.num_drafted
        accepted[count.position, count.source] += count.num_accepted
    ordered = sorted(drafted, key=lambda key: (key[1].value, key[0]))
    return tuple(DraftCount(source, at, drafted[at, source], accepted[at, source]) for at, source in ordered)


@dataclass(frozen=True)
class _Draft:
    """A draft in a plan. ``ngram_id`` is the n-gram's draft for the same position, if it has a certain one."""

    token_id: int
    source: DraftSource
    position: int
    ngram_id: int | None


class _Acceptance:
    """Share of a source's drafts that are right. Without any, it is ``expected``."""

    def __init__(self, expected: float) -> None:
        self._num_right, self._num_seen = 4 * expected, 4.0

    def add(self, is_right: bool) -> None:
        self._num_right = self._num_right * _FADE + is_right
        self._num_seen = self._num_seen * _FADE + 1

    @property
    def rate(self) -> float:
        return self._num_right / self._num_seen


class Drafts:
    """Drafts after the known tokens of a sequence, first those in plans, then those that the head has proposed."""

    def __init__(self, mode: DraftMode) -> None:
        self._mode = mode
        self._in_plans: deque[_Draft] = deque()
        self._proposed: deque[int] = deque()
        self._drafted: Counter[tuple[DraftSource, int]] = Counter()
        self._accepted: Counter[tuple[DraftSource, int]] = Counter()
        self._acceptance = {DraftSource.MODEL: _Acceptance(0.6), DraftSource.NGRAM: _Acceptance(0.5)}

    @property
    def planned_ids(self) -> list[int]:
        """The drafts in plans whose result is not known yet."""
        return [draft.token_id for draft in self._in_plans]

    @property
    def counts(self) -> tuple[DraftCount, ...]:
        """The counts of each source and position that occurred."""
        return tuple(
            DraftCount(source, position, number, self._accepted[source, position])
            for (source, position), number in self._drafted.items()
        )

    def propose(self, token_ids: Tokens[int]) -> None:
        """Take the head's drafts for the positions after the known tokens, those in plans included.

        A proposal that differs from the drafts in plans has no use.
        """
        planned = self.planned_ids
        follows = list(token_ids[: len(planned)]) == planned
        self._proposed = deque(token_ids[len(planned) :] if follows else ())

    def next(self, known_ids: Tokens[int], drafter: NgramDrafter) -> _Draft | None:
        """Return the draft for the position after the known tokens and all drafts in plans, if there is one."""
        position = len(self._in_plans) + 1
        if self._mode is DraftMode.NGRAM:
            found = drafter.draft(known_ids, self.planned_ids)
            return None if found is None else _Draft(found, DraftSource.NGRAM, position, found)
        ngram_id = None
        if self._mode is DraftMode.AUTO:
            ngram_id = drafter.draft(known_ids, self.planned_ids, _CERTAIN_LENGTH)
            ngram, model = self._acceptance[DraftSource.NGRAM], self._acceptance[DraftSource.MODEL]
            if ngram_id is not None and ngram.rate > model.rate:
                return _Draft(ngram_id, DraftSource.NGRAM, position, ngram_id)
        return _Draft(self._proposed[0], DraftSource.MODEL, position, ngram_id) if self._proposed else None

    def plan(self, draft: _Draft) -> None:
        """Record that ``draft``, the result of ``next``, is in a plan."""
        self._in_plans.append(draft)
        self._drafted[draft.source, draft.position] += 1
        if self._proposed and self._proposed.popleft() != draft.token_id:
            self._proposed.clear()

    def accept(self, token_id: int) -> bool:
        """Compare the first draft with the token at its position. Return False, and drop all drafts, if it differs."""
        if not self._in_plans:
            if self._proposed and self._proposed.popleft() != token_id:
                self._proposed.clear()
            return False
        draft = self._in_plans.popleft()
        is_right = draft.token_id == token_id
        self._acceptance[draft.source].add(is_right)
        if draft.source is DraftSource.MODEL and draft.ngram_id is not None:
            self._acceptance[DraftSource.NGRAM].add(draft.ngram_id == token_id)
        if is_right:
            self._accepted[draft.source, draft.position] += 1
        else:
            self.clear()
        return is_right

    def clear(self) -> None:
        """Drop all drafts; the counts stay."""
        self._in_plans.clear()
        self._proposed.clear()
