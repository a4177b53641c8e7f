"""Token counts and speeds of a finished answer. Knows no text."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_k2.scheduling.request import FinishReason


@dataclass(frozen=True)
class AnswerSummary:
    """Token counts and rates of one answer. A rate is None if there were too few tokens to measure it."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were cached and were not computed again."""
    generated_tokens: int
    finish_reason: FinishReason
    seed: int
    time_to_first_token_s: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    num_drafted: int
    num_accepted: int


def total(summaries: Sequence[AnswerSummary]) -> AnswerSummary:
    """Return the totals of several answers of one conversation. Seed and finish reason are those of the last answer."""
    prefill_s = sum(
        (one.prompt_tokens - one.cached_tokens) / one.prefill_tokens_per_s
        for one in summaries
        if one.prefill_tokens_per_s
    )
    timed = [one for one in summaries if one.decode_tokens_per_s]
    num_decoded = sum(one.generated_tokens - 1 for one in timed)
    decode_s = sum((one.generated_tokens - 1) / one.decode_tokens_per_s for one in timed if one.decode_tokens_per_s)
    prompt_tokens = sum(one.prompt_tokens for one in summaries)
    cached_tokens = sum(one.cached_tokens for one in summaries)
    return AnswerSummary(
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        generated_tokens=sum(one.generated_tokens for one in summaries),
        finish_reason=summaries[-1].finish_reason,
        seed=summaries[-1].seed,
        time_to_first_token_s=summaries[0].time_to_first_token_s,
        prefill_tokens_per_s=(prompt_tokens - cached_tokens) / prefill_s if prefill_s else None,
        decode_tokens_per_s=num_decoded / decode_s if decode_s else None,
        num_drafted=sum(one.num_drafted for one in summaries),
        num_accepted=sum(one.num_accepted for one in summaries),
    )
