"""The drafts in the plans that a stage has received, and which of them later plans undo. Computes nothing.

One thread adds plans while another one calls the other methods. No lock is needed, because each change replaces one
entry of a dictionary.
"""

from mlx_k2.protocol.messages import Step
from mlx_k2.scheduling.microbatch import Row

_NUM_KEPT_POSITIONS = 64
"""Number of positions before a row's start whose drafts are kept: at least the number of stages is needed, because at
most one draft per stage is in flight."""


class DraftPlans:
    """Drafts of received plans by slot and position."""

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}  # by slot: the end of the last row
        self._undoing: dict[int, tuple[int, int]] = {}  # by slot: number and position of the last plan that went back
        self._drafts: dict[int, dict[int, int]] = {}  # by slot: drafts by position

    def add(self, step: Step) -> None:
        """Record a plan that has arrived."""
        for row in step.rows:
            if row.position < self._ends.get(row.slot, 0):
                self._undoing[row.slot] = (step.number, row.position)
            kept = range(row.position - _NUM_KEPT_POSITIONS, row.position)
            old_drafts = self._drafts.get(row.slot, {})
            drafts = {position: token_id for position, token_id in old_drafts.items() if position in kept}
            if row.is_draft:
                drafts[row.position] = row.token_ids[0]
            self._drafts[row.slot] = drafts
            self._ends[row.slot] = row.end

    def is_undone(self, number: int, row: Row) -> bool:
        """Return whether a plan after plan ``number`` starts at the row's position or before it, in the row's slot."""
        if row.slot not in self._undoing:
            return False
        undoing_number, position = self._undoing[row.slot]
        return undoing_number > number and position <= row.position

    def drafts_after(self, slot: int, position: int, token_id: int) -> list[int]:
        """Return the planned drafts from ``position`` + 1 on; none if ``token_id`` is not planned at ``position``."""
        drafts = self._drafts.get(slot, {})
        following: list[int] = []
        if drafts.get(position) == token_id:
            while (next_id := drafts.get(position + 1 + len(following))) is not None:
                following.append(next_id)
        return following
