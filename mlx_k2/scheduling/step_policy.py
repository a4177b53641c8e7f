"""Chooses what is fastest by the cost model: how many microbatches, how large a chunk. Knows no sequences."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mlx_k2.scheduling.cost_model import StageCost, StepLoad, pipeline_s, row_load
from mlx_k2.scheduling.speed_estimator import SpeedEstimator

TURNAROUND_S = 0.001
"""From the last stage's token to the next plan on the first stage, hops included: measured 0.25 ms on one machine,
and 0.3 to 0.7 ms a round trip more on a network."""
CHUNK_DELAY_STEPS = 4
"""By how many steps' time a prompt's chunks may delay those who are decoding."""
_AS_GOOD = 1.01
"""Of choices that are this close, the one with more microbatches is taken: it hides what the model does not know."""
_SMALLEST_CHUNK = 16
_MOST_CHUNKS = 256
_CHUNKS_GROWTH = 1.1
_CONTEXT_STEP = 256
"""A round is chosen anew when sequences have grown by so many tokens."""


@dataclass(frozen=True)
class DecodeRound:
    """How sequences that decode take turns: in ``num_microbatches``, so that each gets a token every ``round_s``."""

    num_microbatches: int
    round_s: float


class StepPolicy(Protocol):
    """What a scheduler asks about time."""

    def decode_round(self, num_sequences: int, mean_context: int) -> DecodeRound:
        """How to divide sequences that decode."""

    def chunk_tokens(self, position: int, num_tokens: int, longest: int) -> int:
        """How long the chunks of a prompt should be, of which ``num_tokens`` are left from ``position`` on."""

    def chunk_beside(self, load: StepLoad, position: int, longest: int, limit_s: float) -> int:
        """How many prompt tokens may join ``load`` so that no stage takes longer than ``limit_s``; at least 1."""


class AdaptiveStepPolicy:
    """The choices for stages whose speeds are measured while they run."""

    def __init__(self, stages: Sequence[StageCost], turnaround_s: float = TURNAROUND_S) -> None:
        self._sizes = [stage.sizes for stage in stages]
        self._estimators = [SpeedEstimator(stage.sizes, stage.speed) for stage in stages]
        self._turnaround_s = turnaround_s
        self._rounds: dict[tuple[int, int], DecodeRound] = {}

    @property
    def stages(self) -> list[StageCost]:
        """The stages with their speeds as known now."""
        return [
            StageCost(sizes, estimator.speed) for sizes, estimator in zip(self._sizes, self._estimators, strict=True)
        ]

    def decode_round(self, num_sequences: int, mean_context: int) -> DecodeRound:
        """How to divide sequences that decode."""
        key = num_sequences, mean_context // _CONTEXT_STEP
        if key not in self._rounds:
            self._rounds[key] = best_round(self.stages, num_sequences, mean_context, self._turnaround_s)
        return self._rounds[key]

    def chunk_tokens(self, position: int, num_tokens: int, longest: int) -> int:
        """How long the chunks of a prompt should be, of which ``num_tokens`` are left from ``position`` on."""
        return best_chunk(self.stages, position, num_tokens, longest)

    def chunk_beside(self, load: StepLoad, position: int, longest: int, limit_s: float) -> int:
        """How many prompt tokens may join ``load`` so that no stage takes longer than ``limit_s``; at least 1."""
        return largest_chunk_within(self.stages, load, position, longest, limit_s)

    def through_s(self, load: StepLoad) -> float:
        """Seconds that a step should take through all stages."""
        return sum(stage.step_s(load) for stage in self.stages)

    def observe(self, rank: int, load: StepLoad, busy_s: float) -> None:
        """A stage computed a step in so many seconds."""
        if self._estimators[rank].observe(load, busy_s):
            self._rounds.clear()


def best_round(stages: Sequence[StageCost], num_sequences: int, mean_context: int, turnaround_s: float) -> DecodeRound:
    """The number of microbatches, up to twice the stages, that gives every sequence its next token soonest."""
    most = min(num_sequences, 2 * len(stages))
    rounds = [
        DecodeRound(count, round_s(stages, num_sequences, mean_context, count, turnaround_s))
        for count in range(1, most + 1)
    ]
    good_s = _AS_GOOD * min(choice.round_s for choice in rounds)
    return max((choice for choice in rounds if choice.round_s <= good_s), key=lambda choice: choice.num_microbatches)


def round_s(
    stages: Sequence[StageCost], num_sequences: int, mean_context: int, num_microbatches: int, turnaround_s: float
) -> float:
    """Seconds until every sequence has one more token, when they travel in ``num_microbatches`` even parts.

    Either the slowest stage is always busy, or the largest microbatch's own way through all stages is the longest.
    """
    smaller, num_larger = divmod(num_sequences, num_microbatches)
    larger = smaller + 1 if num_larger else smaller
    one = row_load(mean_context, 1, is_prompt=False, needs_logits=True)
    times = {size: [stage.step_s(_times(one, size)) for stage in stages] for size in {smaller, larger}}
    busy_s = [
        times[larger][rank] * num_larger + times[smaller][rank] * (num_microbatches - num_larger)
        for rank in range(len(stages))
    ]
    return max(*busy_s, sum(times[larger]) + turnaround_s)


def best_chunk(stages: Sequence[StageCost], position: int, num_tokens: int, longest: int) -> int:
    """The chunk length with which a prompt is through all stages soonest.

    Many chunks keep all stages busy: C chunks on two stages gain 2C / (C + 1). Each one reads the weights again.
    """
    best, best_s = longest, math.inf
    for chunk in _chunk_lengths(num_tokens, longest):
        total_s = prefill_s(stages, position, num_tokens, chunk)
        if total_s < best_s:
            best, best_s = chunk, total_s
    return best


def prefill_s(stages: Sequence[StageCost], position: int, num_tokens: int, chunk: int) -> float:
    """Seconds until a prompt's last chunk leaves the last stage."""
    end = position + num_tokens

    def loads() -> Iterator[StepLoad]:
        for start in range(position, end, chunk):
            count = min(chunk, end - start)
            yield row_load(start, count, is_prompt=True, needs_logits=start + count == end)

    return pipeline_s([stage.step_s(load) for stage in stages] for load in loads())


def largest_chunk_within(
    stages: Sequence[StageCost], load: StepLoad, position: int, longest: int, limit_s: float
) -> int:
    """How many prompt tokens may join ``load`` so that no stage takes longer than ``limit_s``; at least 1."""
    fitting, too_long = 1, longest + 1
    while too_long - fitting > 1:
        count = (fitting + too_long) // 2
        joined = load + row_load(position, count, is_prompt=True, needs_logits=False)
        if max(stage.step_s(joined) for stage in stages) <= limit_s:
            fitting = count
        else:
            too_long = count
    return fitting


def _chunk_lengths(num_tokens: int, longest: int) -> Iterator[int]:
    """From the longest chunks to the shortest ones worth a thought."""
    count = -(-num_tokens // longest)
    while count <= _MOST_CHUNKS:
        chunk = -(-num_tokens // count)
        yield min(chunk, longest)
        if chunk <= _SMALLEST_CHUNK:
            return
        count = max(count + 1, int(count * _CHUNKS_GROWTH))
    if num_tokens > _MOST_CHUNKS * longest:
        yield longest


def _times(load: StepLoad, count: int) -> StepLoad:
    return StepLoad(
        load.num_tokens * count,
        load.num_sampled * count,
        load.absorbed_pairs * count,
        load.naive_pairs * count,
        load.absorbed_keys * count,
        load.naive_keys * count,
    )
