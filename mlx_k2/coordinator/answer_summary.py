"""Token counts and speeds of a finished answer. Knows no text."""

from collections.abc import Sequence

import msgspec

from mlx_k2.scheduling.drafts import DraftCount, merge_counts
from mlx_k2.scheduling.request import FinishReason, Request


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts and rates of an answer. A rate is None if there were too few tokens to measure it."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were cached and were not computed again."""
    generated_tokens: int
    drafted: int = 0
    """Draft tokens that were sent to the stages."""
    accepted: int = 0
    """Draft tokens that are part of the answer."""
    drafts: tuple[DraftCount, ...] = ()
    """``drafted`` and ``accepted`` by source, and by position after the last known token."""
    time_to_first_token_s: float | None
    prefill_tokens_per_s: float | None
    """Computed prompt tokens divided by ``time_to_first_token_s``, which includes the wait for a slot."""
    decode_tokens_per_s: float | None


class AnswerSummary(Usage, frozen=True, kw_only=True):
    """The counts and rates of one answer, why it ended, and its seed."""

    finish_reason: FinishReason
    seed: int

    @property
    def usage(self) -> Usage:
        """The counts and rates alone."""
        return Usage(**{name: getattr(self, name) for name in Usage.__struct_fields__})


class AnswerTimer:
    """Arrival times of one answer's tokens, in seconds of time.perf_counter. Rates are of sampled tokens only."""

    def __init__(self, began: float) -> None:
        self.began = began
        """The time at which the request was submitted."""
        self._num_tokens = 0
        self._num_sampled = 0
        self._first_at = self._last_at = began

    def add(self, arrived_at: float, *, is_forced: bool) -> None:
        """Count a token. A forced token was not sampled."""
        self._num_tokens += 1
        if not is_forced:
            if not self._num_sampled:
                self._first_at = arrived_at
            self._last_at = arrived_at
            self._num_sampled += 1

    def summary(
        self, request: Request, reason: FinishReason, num_cached: int, drafts: tuple[DraftCount, ...] = ()
    ) -> AnswerSummary:
        """Return the summary of an answer that ends now with ``reason``."""
        num_prompt = len(request.prompt_ids)
        first_s = self._first_at - self.began if self._num_sampled else None
        decode_s = self._last_at - self._first_at
        return AnswerSummary(
            prompt_tokens=num_prompt,
            cached_tokens=num_cached,
            generated_tokens=self._num_tokens,
            finish_reason=reason,
            seed=request.sampling.seed,
            time_to_first_token_s=first_s,
            prefill_tokens_per_s=(num_prompt - num_cached) / first_s if first_s else None,
            decode_tokens_per_s=(self._num_sampled - 1) / decode_s if decode_s > 0 else None,
            drafted=sum(count.num_drafted for count in drafts),
            accepted=sum(count.num_accepted for count in drafts),
            drafts=drafts,
        )


def total(summaries: Sequence[AnswerSummary]) -> AnswerSummary:
    """Return the totals of several answers of one conversation.

    Seed and finish reason are those of the last answer, the time to the first token is that of the first one. A rate is
    the harmonic mean of the answers' rates, weighted by their tokens.
    """
    prefill_s, num_decoded, decode_s = 0.0, 0, 0.0
    for each in summaries:
        if each.prefill_tokens_per_s:
            prefill_s += (each.prompt_tokens - each.cached_tokens) / each.prefill_tokens_per_s
        if each.decode_tokens_per_s:
            num_decoded += each.generated_tokens - 1
            decode_s += (each.generated_tokens - 1) / each.decode_tokens_per_s
    prompt_tokens = sum(each.prompt_tokens for each in summaries)
    cached_tokens = sum(each.cached_tokens for each in summaries)
    return AnswerSummary(
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        generated_tokens=sum(each.generated_tokens for each in summaries),
        finish_reason=summaries[-1].finish_reason,
        seed=summaries[-1].seed,
        time_to_first_token_s=summaries[0].time_to_first_token_s,
        prefill_tokens_per_s=(prompt_tokens - cached_tokens) / prefill_s if prefill_s else None,
        decode_tokens_per_s=num_decoded / decode_s if decode_s else None,
        drafted=sum(each.drafted for each in summaries),
        accepted=sum(each.accepted for each in summaries),
        drafts=merge_counts(count for each in summaries for count in each.drafts),
    )
