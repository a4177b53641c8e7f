"""Sequence: one request's tokens and the progress of their computation. Knows no other sequence."""

from array import array
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

import msgspec

from mlx_k2.errors import MlxK2Error, RequestFailed
from mlx_k2.sampling import REPETITION_WINDOW, LogitBias, SampledToken, Sampling
from mlx_k2.scheduling.drafter import DraftMode, NgramDrafter
from mlx_k2.scheduling.drafts import Drafts
from mlx_k2.scheduling.request import FinishReason, Priority, Request
from mlx_k2.scheduling.token_policy import Accepted, TokenPolicy
from mlx_k2.token_mask import TokenMask

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

INDEX_TOKENS = 128  # maximum number of tokens that one call indexes for n-gram drafts; takes about 0.2 ms


@dataclass(frozen=True)
class SharedPrefix:
    """Prefix of a prompt that is already cached in slot ``copy_from``; None: in the sequence's own slot."""

    num_tokens: int = 0
    copy_from: int | None = None


@dataclass(frozen=True)
class AppendedToken:
    """A token of an answer, and the result of the token policy for it. A forced token was not sampled."""

    token: SampledToken
    accepted: Accepted
    is_forced: bool = False


class Sequence:
    """A request that waits for a slot, runs in one or has ended.

    Its known tokens are the prompt and the answer so far. Plans carry draft tokens before the tokens at their positions
    are known. After a wrong draft token its position is planned again. Tokens that were sampled after the wrong one
    arrive with the number of a plan that no longer counts, and are discarded.
    """

    def __init__(
        self,
        request: Request,
        context_tokens: int,
        policy: TokenPolicy | None = None,
        draft_mode: DraftMode = DraftMode.NGRAM,
    ) -> None:
        self.request = request
        self.sampling: Sampling = msgspec.structs.replace(
            request.sampling, logit_bias=(), presence_penalty=0.0, frequency_penalty=0.0
        )
        """The parameters for the last stage. Each row has the sum of bias and penalties as its own ``logit_bias``."""
        self.token_ids = array("I", request.prompt_ids)
        """The prompt and the answer so far. An array, because slots compare long prefixes."""
        self.slot: int | None = None
        """The slot while the sequence runs; None while it waits."""
        self.shared = SharedPrefix()
        self.num_cached: int | None = None
        """Number of prompt tokens that were cached when the sequence first started; None before."""
        self.num_planned = 0
        """Number of positions that are cached or in a plan that was sent, draft tokens included."""
        self.last_plan = -1
        """Number of the last plan that carried tokens of this sequence; -1 before the first one."""
        self.chunk_tokens: int | None = None
        """Length of this prompt's chunks; None until it is chosen."""
        self.drafter = NgramDrafter()
        self.drafts = Drafts(draft_mode)
        self.finish_reason: FinishReason | None = None
        self.error: MlxK2Error | None = None
        """The cause of FinishReason.ERROR; None with any other reason."""
        self._policy = policy or TokenPolicy()
        self._biases = dict(request.sampling.logit_bias)
        """Bias by token id: the request's bias less the penalties for the answer so far."""
        self._answer_ids: set[int] = set()  # the distinct tokens of the answer, for the presence penalty
        self._has_penalties = bool(request.sampling.presence_penalty or request.sampling.frequency_penalty)
        self._last_sampled_by: int | None = None
        """Number of the plan that sampled the last token; None if it was forced or belongs to the prompt."""
        self._first_counting_plan = 0
        """Number of the first plan whose sampled token is appended; tokens of earlier plans are discarded."""
        self._max_length = min(len(request.prompt_ids) + request.max_tokens, context_tokens)

    @property
    def is_background(self) -> bool:
        """True if the request has background priority."""
        return self.request.priority is Priority.BACKGROUND

    @property
    def num_prompt(self) -> int:
        """Number of prompt tokens."""
        return len(self.request.prompt_ids)

    @property
    def num_prompt_left(self) -> int:
        """Number of prompt tokens that are neither cached nor in a plan that was sent."""
        return max(0, self.num_prompt - self.num_planned)

    @property
    def prompt_ids(self) -> "array[int]":
        """The tokens of the prompt."""
        return self.token_ids[: self.num_prompt]

    @property
    def num_unplanned(self) -> int:
        """Number of known tokens that are neither cached nor in a plan that was sent."""
        return max(0, len(self.token_ids) - self.num_planned)

    @property
    def cached_ids(self) -> "array[int]":
        """The known tokens whose positions are cached or in a plan that was sent, without the last known token.

        If the answer ends with it, its position is computed only with drafts, and what a slot keeps must not depend on
        drafts.
        """
        return self.token_ids[: min(self.num_planned, len(self.token_ids) - 1)]

    def recent_ids(self, end: int) -> tuple[int, ...]:
        """Return the tokens before position ``end`` that the repetition penalty reads, draft tokens included."""
        known = self.token_ids[max(0, end - REPETITION_WINDOW) : end]
        drafted = self._drafted_before(end)
        return tuple([*known, *drafted][-REPETITION_WINDOW:])

    def logit_bias(self, end: int) -> LogitBias | None:
        """Return the sum of bias and penalties for the token at position ``end``; drafts before it count as answer."""
        biases, answer_ids = self._biases, self._answer_ids
        if self._has_penalties and (drafts := self._drafted_before(end)):
            biases, answer_ids = biases.copy(), answer_ids.copy()
            for token_id in drafts:
                self._penalize(token_id, biases, answer_ids)
        return LogitBias.of(biases) if biases else None

    def token_mask(self, end: int) -> TokenMask | None:
        """Return the policy's mask for the token at position ``end``, after the drafts before it."""
        return self._call_policy(self._policy.token_mask, None, self._drafted_before(end))

    def start(self, slot: int, shared: SharedPrefix, drafter: NgramDrafter) -> None:
        """Start to run in ``slot``, which holds ``shared`` already or gets a copy of it with the first row."""
        self.slot = slot
        self.shared = shared
        self.num_planned = shared.num_tokens
        self.drafter = drafter
        if self.num_cached is None:
            self.num_cached = shared.num_tokens

    def reset(self, next_plan: int) -> None:
        """Mark all positions as not cached. ``next_plan`` is the number of the first plan that counts again."""
        self.shared = SharedPrefix()
        self.num_planned = 0
        self.chunk_tokens = None
        self.drafts.clear()
        self._first_counting_plan = next_plan

    def draft(self) -> int | None:
        """Return a draft token for the position after all planned ones, and record it as drafted.

        None if no source has one, if the policy refuses it, or if it would end the sequence: nothing would follow it.
        """
        assert self.num_unplanned == 0, "known tokens are planned before draft tokens"
        if self.num_planned + 1 >= self._max_length:
            return None
        self.drafter.index(self.token_ids, INDEX_TOKENS)
        draft = self.drafts.next(self.token_ids, self.drafter)
        if draft is None or draft.token_id in self.request.stop_ids:
            return None
        if not self._call_policy(self._policy.may_draft, False, self.drafts.planned_ids, draft.token_id):
            return None
        self.drafts.plan(draft)
        return draft.token_id

    def counts(self, plan: int) -> bool:
        """Return whether the token that plan ``plan`` samples will be appended, as far as is known."""
        return self.finish_reason is None and plan >= self._first_counting_plan

    def propose(self, plan: int, token_ids: SequenceOf[int]) -> None:
        """Store the draft head's tokens after the one that ``plan`` sampled, if that one is still the last token."""
        if self.finish_reason is None and plan == self._last_sampled_by:
            self.drafts.propose(token_ids)

    def append_forced(self) -> list[AppendedToken]:
        """Append the tokens that the policy forces now; return them."""
        appended: list[AppendedToken] = []
        if self.finish_reason is not None:
            return appended
        no_tokens: SequenceOf[int] = ()
        forced = deque(self._call_policy(self._policy.forced, no_tokens))
        while forced and self.finish_reason is None:
            appended.append(self._append(SampledToken(forced.popleft()), is_forced=True))
            forced = forced or deque(self._call_policy(self._policy.forced, no_tokens))
        return appended

    def append_sampled(self, plan: int, token: SampledToken, next_plan: int) -> list[AppendedToken]:
        """Append the token that plan ``plan`` sampled, and the tokens that the policy forces after it; return them.

        ``next_plan`` is the number of the next plan to be sent. Return nothing if the plan no longer counts: the
        sequence has ended or was reset, or the token follows a wrong draft token.
        """
        if not self.counts(plan):
            return []
        appended = [self._append(token)]
        is_draft_right = self.drafts.accept(token.token_id)
        # At most these positions were planned with the right tokens: the last one only if its draft was right.
        num_right = len(self.token_ids) if is_draft_right else len(self.token_ids) - 1
        forced = self.append_forced()
        self._last_sampled_by = None if forced else plan
        if forced or not is_draft_right:
            self.drafts.clear()
            self.num_planned = min(self.num_planned, num_right)
            self._first_counting_plan = next_plan
        return appended + forced

    def finish(self) -> Accepted:
        """Return the text and parts that the policy held back. Call this once, when no token follows."""
        try:
            return self._policy.finish()
        except Exception:  # noqa: BLE001 - the sequence has ended already
            return Accepted()

    def _drafted_before(self, end: int) -> list[int]:
        """Return the drafts in plans before position ``end``."""
        return self.drafts.planned_ids[: max(0, end - len(self.token_ids))]

    def _penalize(self, token_id: int, biases: dict[int, float], answer_ids: set[int]) -> None:
        """Subtract the penalties for one more occurrence of a token, and add it to ``answer_ids``."""
        penalty = self.request.sampling.frequency_penalty
        if token_id not in answer_ids:
            penalty += self.request.sampling.presence_penalty
            answer_ids.add(token_id)
        if penalty:
            biases[token_id] = biases.get(token_id, 0.0) - penalty

    def _append(self, token: SampledToken, *, is_forced: bool = False) -> AppendedToken:
        self.token_ids.append(token.token_id)
        if self._has_penalties:
            self._penalize(token.token_id, self._biases, self._answer_ids)
        accepted = self._call_policy(self._policy.accept, Accepted(), token.token_id)
        if self.finish_reason is not None:
            return AppendedToken(token, accepted, is_forced)
        if token.token_id in self.request.stop_ids:
            self.finish_reason = FinishReason.STOP
        elif accepted.finish_reason is not None:
            self.finish_reason = accepted.finish_reason
        elif len(self.token_ids) >= self._max_length:
            self.finish_reason = FinishReason.LENGTH
        if self.finish_reason is not None:
            rest = self.finish()
            accepted = Accepted(accepted.text + rest.text, (*accepted.parts, *rest.parts), self.finish_reason)
        return AppendedToken(token, accepted, is_forced)

    def _call_policy(self, method: Callable[[*Arguments], Result], default: Result, *arguments: *Arguments) -> Result:
        """Call a method of the policy. If it raises an error, end this sequence with it and return ``default``."""
        try:
            return method(*arguments)
        except Exception as error:  # noqa: BLE001 - any error of a policy
            self._fail(error)
            return default

    def _fail(self, error: Exception) -> None:
        self.finish_reason = FinishReason.ERROR
        if isinstance(error, RequestFailed):
            self.error = error
            return
        self.error = RequestFailed(f"request ended: its token policy failed: {type(error).__name__}: {error}")
        self.error.__cause__ = error
