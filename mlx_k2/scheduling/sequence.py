"""Sequence: one request's tokens and the progress of their computation. Knows no other sequence."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from mlx_k2.sampling import REPETITION_WINDOW
from mlx_k2.scheduling.ngrams import NgramIndex
from mlx_k2.scheduling.request import FinishReason, Request


@dataclass(frozen=True)
class SharedPrefix:
    """Prefix of a prompt that is already cached: in the sequence's own slot, or in slot ``copy_from``."""

    num_tokens: int = 0
    copy_from: int | None = None


_NOTHING_SHARED = SharedPrefix()


class Sequence:
    """A running request in its cache slot. Plans carry draft tokens before it is known whether they are right.

    A wrong draft token is undone by planning its position again. Tokens that were sampled after it arrive with the
    number of a plan that no longer counts, and are discarded.
    """

    def __init__(
        self, request: Request, slot: int, context_tokens: int, shared: SharedPrefix = _NOTHING_SHARED
    ) -> None:
        self.request = request
        self.slot = slot
        self.token_ids = list(request.prompt_ids)
        self.shared = shared
        self.num_planned = shared.num_tokens
        """Number of positions that are cached or in a plan that was sent, draft tokens included."""
        self.last_plan = -1
        """Number of the last plan that carried tokens of this sequence; -1 before the first one."""
        self.chunk_tokens: int | None = None
        """Length of this prompt's chunks; None until it is chosen."""
        self.num_drafted = 0
        self.num_accepted = 0
        self.finish_reason: FinishReason | None = None
        self._drafts: list[int] = []
        self._first_counting_plan = 0
        self._ngrams = NgramIndex()
        self._end = min(len(request.prompt_ids) + request.max_tokens, context_tokens)

    @property
    def num_prompt(self) -> int:
        """Number of prompt tokens."""
        return len(self.request.prompt_ids)

    @property
    def num_prompt_left(self) -> int:
        """Number of prompt tokens that no plan has carried yet."""
        return max(0, self.num_prompt - self.num_planned)

    @property
    def generated_ids(self) -> Tokens[int]:
        """Tokens sampled so far, a stop token included."""
        return self.token_ids[self.num_prompt :]

    @property
    def num_unplanned(self) -> int:
        """Number of known tokens that no plan has carried yet."""
        return max(0, len(self.token_ids) - self.num_planned)

    @property
    def cached_ids(self) -> Tokens[int]:
        """The known tokens whose positions are cached or in a plan that was sent."""
        return self.token_ids[: self.num_planned]

    def recent_ids(self, end: int) -> tuple[int, ...]:
        """Return the tokens before position ``end`` that the repetition penalty reads, draft tokens included."""
        known = self.token_ids[max(0, end - REPETITION_WINDOW) : end]
        drafted = self._drafts[: max(0, end - len(self.token_ids))]
        return tuple([*known, *drafted][-REPETITION_WINDOW:])

    def reset(self, next_plan: int) -> None:
        """Mark all positions as not cached. ``next_plan`` is the number of the first plan that counts again."""
        self.shared = _NOTHING_SHARED
        self.num_planned = 0
        self.chunk_tokens = None
        self._drafts.clear()
        self._first_counting_plan = next_plan

    def draft(self) -> int | None:
        """Return a draft token for the position after all planned ones, and record it as drafted.

        None if no earlier text matches, or if the token would end the sequence: nothing would follow it.
        """
        assert self.num_unplanned == 0, "known tokens go before draft tokens"
        if self.num_planned + 1 >= self._end:
            return None
        self._ngrams.update(self.token_ids)
        token_id = self._ngrams.draft(self.token_ids, self._drafts)
        if token_id is None or token_id in self.request.stop_ids:
            return None
        self._drafts.append(token_id)
        self.num_drafted += 1
        return token_id

    def append_sampled(self, plan: int, token_id: int, next_plan: int) -> bool:
        """Append the token that plan ``plan`` sampled. ``next_plan`` is the number of the next plan to be sent.

        Return False if the plan no longer counts: the sequence has ended or was reset, or the token follows a wrong
        draft token.
        """
        if self.finish_reason is not None or plan < self._first_counting_plan:
            return False
        self.token_ids.append(token_id)
        if token_id in self.request.stop_ids:
            self.finish_reason = FinishReason.STOP
        elif len(self.token_ids) >= self._end:
            self.finish_reason = FinishReason.LENGTH
        if self._drafts and self._drafts.pop(0) == token_id:
            self.num_accepted += 1
        else:
            self._drafts.clear()
            self.num_planned = min(self.num_planned, len(self.token_ids) - 1)
            self._first_counting_plan = next_plan
        return True
