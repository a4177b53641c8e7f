"""One request's tokens and how far they are computed. Knows no other sequence."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from mlx_k2.sampling import REPETITION_WINDOW
from mlx_k2.scheduling.ngrams import NgramIndex
from mlx_k2.scheduling.request import FinishReason, Request


@dataclass(frozen=True)
class SharedPrefix:
    """The beginning of a prompt that was in the cache already: in the sequence's own slot, or copied from another."""

    num_tokens: int = 0
    copy_from: int | None = None


_NOTHING_SHARED = SharedPrefix()


class Sequence:
    """A running request in its cache slot. Guesses are tokens that plans carry before anyone knows that they are right.

    A wrong guess is undone by planning its position again; what was computed from it comes back with the number of a
    plan that no longer counts.
    """

    def __init__(
        self, request: Request, slot: int, context_tokens: int, shared: SharedPrefix = _NOTHING_SHARED
    ) -> None:
        self.request = request
        self.slot = slot
        self.token_ids = list(request.prompt_ids)
        self.shared = shared
        self.num_planned = shared.num_tokens
        """Positions that are in the cache, or on their way there in a plan that was sent; guesses included."""
        self.last_plan = -1
        """The number of the last plan that carried tokens of this sequence."""
        self.chunk_tokens: int | None = None
        """How long this prompt's chunks are, once that is chosen."""
        self.num_drafted = 0
        self.num_accepted = 0
        self.finish_reason: FinishReason | None = None
        self._drafts: list[int] = []
        self._first_counting_plan = 0
        self._ngrams = NgramIndex()
        self._end = min(len(request.prompt_ids) + request.max_tokens, context_tokens)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_prompt_left(self) -> int:
        """Tokens of the prompt that no plan has carried yet."""
        return max(0, self.num_prompt - self.num_planned)

    @property
    def generated_ids(self) -> Tokens[int]:
        """Tokens drawn so far, a stop token included."""
        return self.token_ids[self.num_prompt :]

    @property
    def num_unplanned(self) -> int:
        """Known tokens that no plan has carried yet."""
        return max(0, len(self.token_ids) - self.num_planned)

    @property
    def cached_ids(self) -> Tokens[int]:
        """The known tokens whose positions are in the cache, or on their way there."""
        return self.token_ids[: self.num_planned]

    def recent_ids(self, end: int) -> tuple[int, ...]:
        """The last tokens before position ``end``, guesses included, which a repetition penalty looks at."""
        known = self.token_ids[max(0, end - REPETITION_WINDOW) : end]
        drafted = self._drafts[: max(0, end - len(self.token_ids))]
        return tuple([*known, *drafted][-REPETITION_WINDOW:])

    def reset(self, next_plan: int) -> None:
        """Nothing of it is cached any more; ``next_plan`` is the number of the first plan that counts again."""
        self.shared = _NOTHING_SHARED
        self.num_planned = 0
        self.chunk_tokens = None
        self._drafts.clear()
        self._first_counting_plan = next_plan

    def draft(self) -> int | None:
        """Guess the token after all that is planned, if the text has a precedent and there is room; it counts at once.

        None also where the guess would end the sequence: nothing would follow it.
        """
        assert self.num_unplanned == 0, "known tokens go before guesses"
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
        """Take the token that plan ``plan`` drew; ``next_plan`` is the number of the next one to be sent.

        False where the plan no longer counts: the sequence is finished, or what was drawn follows a wrong guess.
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
