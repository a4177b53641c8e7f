"""Step policy: chooses the fastest number of microbatches and chunk length by the cost model. Knows no sequences."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_k2.scheduling.cost_model import StageCost, StepLoad, pipeline_s, row_load
from mlx_k2.scheduling.draft_switch import EXPECTED_ACCEPTANCE
from mlx_k2.scheduling.speed_estimator import SpeedEstimator

TURNAROUND_S = 0.001
"""Time from the last stage's token to the next plan on the first stage, hops included. Measured: 0.25 ms on one
machine, and 0.3 to 0.7 ms more per round trip on a network."""
CHUNK_DELAY_STEPS = 4
"""Maximum delay of a decode round by prompt chunks, as a multiple of ``round_s``."""
_TIE_FACTOR = 1.01
"""Among microbatch counts within 1% of the best predicted round time, the largest is used. This hides errors of the
cost model."""
_MIN_CHUNK_TOKENS = 16  # the first chunk length of at most this is the last one that is tried
_MAX_CHUNKS = 256  # no larger number of chunks is tried, unless ``longest`` requires it: each one costs time to predict
_CHUNKS_GROWTH = 1.1  # factor from one number of chunks that is tried to the next
_CONTEXT_STEP_TOKENS = 256  # the decode round is chosen again when the mean context passes a multiple of this
_SHORT_CONTEXT_TOKENS = 256  # the context for which drafts are predicted to be faster or not
_FADE = 0.9  # factor on a draft time's weight in the mean after each later time: about the last 10 times count


@dataclass(frozen=True)
class DecodeRound:
    """Division of the decoding sequences into microbatches. Each sequence gets one token every ``round_s`` seconds."""

    num_microbatches: int
    round_s: float


class StepPolicy:
    """Step policy for stages whose speeds are measured while they run. ``turnaround_s`` is as TURNAROUND_S."""

    def __init__(self, stages: Sequence[StageCost], turnaround_s: float = TURNAROUND_S) -> None:
        self._sizes = [stage.sizes for stage in stages]
        self._estimators = [SpeedEstimator(stage.sizes, stage.speed) for stage in stages]
        self._turnaround_s = turnaround_s
        self._rounds: dict[tuple[int, int], DecodeRound] = {}
        self._draft_s: float | None = None  # mean of the draft head's times; None until the first one

    @property
    def stages(self) -> list[StageCost]:
        """The stages with their current speed estimates."""
        return [
            StageCost(sizes, estimator.speed) for sizes, estimator in zip(self._sizes, self._estimators, strict=True)
        ]

    def decode_round(self, num_sequences: int, mean_context: int) -> DecodeRound:
        """Return the division of ``num_sequences`` decoding sequences into microbatches."""
        key = num_sequences, mean_context // _CONTEXT_STEP_TOKENS
        if key not in self._rounds:
            self._rounds[key] = best_round(self.stages, num_sequences, mean_context, self._turnaround_s)
        return self._rounds[key]

    def chunk_tokens(self, position: int, num_tokens: int, longest: int) -> int:
        """Return the chunk length, at most ``longest``, with which a prompt leaves the last stage soonest.

        The prompt has ``num_tokens`` tokens, the first at ``position``. Many chunks keep all stages busy: C chunks on
        two stages give a speedup of 2C / (C + 1). But each chunk reads the weights again.
        """
        stages = self.stages
        lengths = _chunk_lengths(num_tokens, longest)
        return min(lengths, key=lambda chunk: prefill_s(stages, position, num_tokens, chunk))

    def chunk_beside(self, load: StepLoad, position: int, longest: int, limit_s: float) -> int:
        """Return how many prompt tokens may join ``load`` if a step may take at most ``limit_s`` on each stage.

        They begin at ``position`` and are at most ``longest``. One token may join in any case.
        """
        stages = self.stages

        def slowest_s(count: int) -> float:
            joined = load + row_load(position, count, is_prompt=True, needs_logits=False)
            return max(stage.step_s(joined) for stage in stages)

        return max(1, bisect_right(range(1, longest + 1), limit_s, key=slowest_s))

    def drafts_are_faster(self) -> bool:
        """Return whether a lone sequence is predicted to be faster with the draft head's tokens.

        The prediction is for a short context: a longer one adds to the times of all stages alike.
        """
        load = row_load(_SHORT_CONTEXT_TOKENS, 1, is_prompt=False, needs_logits=True)
        stages_s = [stage.step_s(load) for stage in self.stages]
        draft_s = self.stages[-1].draft_s if self._draft_s is None else self._draft_s
        with_drafts_s = drafted_token_s(stages_s, draft_s, self._turnaround_s, EXPECTED_ACCEPTANCE)
        return with_drafts_s < sum(stages_s) + self._turnaround_s

    def observe_draft(self, busy_s: float) -> None:
        """Record that the draft head took ``busy_s`` seconds for the drafts after one token."""
        self._draft_s = busy_s if self._draft_s is None else _FADE * self._draft_s + (1 - _FADE) * busy_s

    def latency_s(self, load: StepLoad) -> float:
        """Return the predicted seconds of a step through all stages."""
        return sum(stage.step_s(load) for stage in self.stages)

    def observe(self, rank: int, load: StepLoad, busy_s: float) -> None:
        """Record that stage ``rank`` computed ``load`` in ``busy_s`` seconds."""
        if self._estimators[rank].observe(load, busy_s):
            self._rounds.clear()


def drafted_token_s(stages_s: Sequence[float], draft_s: float, turnaround_s: float, acceptance: float) -> float:
    """Return the mean seconds per token if a draft is in flight for each stage but one.

    After a right draft the next token comes one cycle later: after the time of the slowest stage with its hop, or of
    the last stage with the draft head (``draft_s``). After a wrong one it comes after the time through all stages.
    """
    hop_s = turnaround_s / len(stages_s)
    cycle_s = max([*(seconds + hop_s for seconds in stages_s[:-1]), stages_s[-1] + draft_s])
    return acceptance * cycle_s + (1 - acceptance) * (sum(stages_s) + turnaround_s)


def best_round(stages: Sequence[StageCost], num_sequences: int, mean_context: int, turnaround_s: float) -> DecodeRound:
    """Return the decode round with the shortest predicted time, with up to twice as many microbatches as stages."""
    max_microbatches = min(num_sequences, 2 * len(stages))
    rounds = [
        DecodeRound(count, round_s(stages, num_sequences, mean_context, count, turnaround_s))
        for count in range(1, max_microbatches + 1)
    ]
    limit_s = _TIE_FACTOR * min(choice.round_s for choice in rounds)
    return next(choice for choice in reversed(rounds) if choice.round_s <= limit_s)


def round_s(
    stages: Sequence[StageCost], num_sequences: int, mean_context: int, num_microbatches: int, turnaround_s: float
) -> float:
    """Return the seconds until every sequence has one more token, with ``num_microbatches`` microbatches of even size.

    This is the larger of two bounds: the slowest stage's total busy time, and the largest microbatch's time through all
    stages plus ``turnaround_s``.
    """
    smaller, num_larger = divmod(num_sequences, num_microbatches)
    larger = smaller + 1 if num_larger else smaller
    token_load = row_load(mean_context, 1, is_prompt=False, needs_logits=True)
    larger_s = [stage.step_s(token_load * larger) for stage in stages]
    busy_s = [
        num_larger * step_s + (num_microbatches - num_larger) * stage.step_s(token_load * smaller)
        for stage, step_s in zip(stages, larger_s, strict=True)
    ]
    return max(*busy_s, sum(larger_s) + turnaround_s)


def prefill_s(stages: Sequence[StageCost], position: int, num_tokens: int, chunk: int) -> float:
    """Return the seconds until ``num_tokens`` prompt tokens in chunks of ``chunk`` have left the last stage."""
    end = position + num_tokens
    steps_s = []
    for start in range(position, end, chunk):
        count = min(chunk, end - start)
        load = row_load(start, count, is_prompt=True, needs_logits=start + count == end)
        steps_s.append([stage.step_s(load) for stage in stages])
    return pipeline_s(steps_s)


def _chunk_lengths(num_tokens: int, longest: int) -> Iterator[int]:
    """Yield candidate chunk lengths, from the longest to the shortest useful one."""
    num_chunks = math.ceil(num_tokens / longest)
    if num_chunks > _MAX_CHUNKS:
        yield longest
    while num_chunks <= _MAX_CHUNKS:
        chunk = math.ceil(num_tokens / num_chunks)
        yield chunk
        if chunk <= _MIN_CHUNK_TOKENS:
            return
        num_chunks = max(num_chunks + 1, int(num_chunks * _CHUNKS_GROWTH))
