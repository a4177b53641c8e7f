"""The drafts in the plans that a stage has received, and which of them later plans undo. Computes nothing.

The reading thread adds plans, the computing thread asks: each change replaces one entry of a dictionary.
"""

from mlx_k2.protocol.messages import Step
from mlx_k2.scheduling.microbatch import Row

_KEPT_DRAFTS = 64
"""Drafts of a slot that are kept: as many as stages, at most one is in flight for each."""


class DraftPlans:
    """Drafts of received plans by slot and position."""

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}
        self._undone: dict[int, tuple[int, int]] = {}  # by slot: the last plan that starts before an earlier one's end
        self._drafts: dict[int, dict[int, int]] = {}

    def add(self, step: Step) -> None:
        """Record a plan that has arrived."""
        for row in step.rows:
            drafts = self._drafts.get(row.slot, {})
            if row.position < self._ends.get(row.slot, 0):
                self._undone[row.slot] = (step.number, row.position)
            kept = range(row.position - _KEPT_DRAFTS, row.position)
            drafts = {position: token_id for position, token_id in drafts.items() if position in kept}
            if row.is_draft:
                drafts[row.position] = row.token_ids[0]
            self._drafts[row.slot] = drafts
            self._ends[row.slot] = row.end

    def is_undone(self, number: int, row: Row) -> bool:
        """Return whether a plan after ``number`` starts at the row's position of its slot or before it."""
        undoing, position = self._undone.get(row.slot, (number, 0))
        return undoing > number and position <= row.position

    def following(self, slot: int, position: int, token_id: int) -> list[int]:
        """Return the drafts in plans after ``token_id`` at ``position``; none if another token is planned there."""
        drafts = self._drafts.get(slot, {})
        found: list[int] = []
        if drafts.get(position) == token_id:
            while (next_id := drafts.get(position + 1 + len(found))) is not None:
                found.append(next_id)
        return found
