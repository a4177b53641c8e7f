"""Cost model of a step on a stage: fixed time + bytes read / bandwidth + operations / speed. Measures nothing.

A stage reads its dense weights once per microbatch of any size. It reads those routed experts that at least one token
uses, and those cache rows that are attended to.
"""

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

_TILES_FROM_TOKENS = 17  # the batch kernels, without tiles, compute steps of up to 16 tokens


@dataclass(frozen=True, kw_only=True)
class StageSizes:
    """Bytes and operations of one stage, summed over its layers. Calculated from the model's shapes.

    Operations are multiplications and additions. "Head" is the norm and the output projection.
    """

    dense_bytes: int
    """Weights that each microbatch reads: all but routed experts and head."""
    head_bytes: int
    """Weights of the head, read when a token is sampled; 0 except on the last stage."""
    expert_bytes: int
    """Bytes of one routed expert, summed over the layers that have experts."""
    num_experts: int
    experts_per_token: int
    position_bytes: int
    """Bytes of one cache position, summed over the layers."""
    operations_per_token: int
    """Operations of all weights but routed experts and head."""
    operations_per_expert_token: int
    """Operations of one routed expert for one token, summed over the layers that have experts."""
    operations_per_sampled_token: int
    absorbed_operations: int
    """Operations of absorbed attention, for one generated token and one position that it attends to."""
    naive_operations: int
    """Operations of naive attention, for one prompt token and one position that it attends to."""
    rebuild_operations: int
    """Operations that rebuild one position's keys and values, once for each prompt chunk that attends to it."""
    draft_bytes: int = 0
    """Weights that the draft head reads for one draft token; 0 except on the last stage."""
    draft_operations: int = 0
    """Operations of the draft head for one draft token."""
    tile_rows: int = 1
    """Tokens of an expert that are computed together, as a tile. A tile that is not full takes as long as a full one.
    1: without tiles."""


@dataclass(frozen=True)
class StageSpeed:
    """Speed of a stage's machine: fixed seconds per step, bytes per second, operations per second."""

    fixed_s: float
    bytes_per_s: float
    operations_per_s: float


@dataclass(frozen=True)
class StepLoad:
    """Work of a step, the same on every stage. Generated and draft tokens are "absorbed", prompt tokens "naive"."""

    num_tokens: int = 0
    num_sampled: int = 0
    absorbed_pairs: int = 0
    """Number of pairs of a token and a position that it attends to."""
    naive_pairs: int = 0
    absorbed_keys: int = 0
    """Number of cached positions that are read, those of the step's own tokens included; counted once per row."""
    naive_keys: int = 0

    def __add__(self, other: "StepLoad") -> "StepLoad":
        return StepLoad(*map(operator.add, vars(self).values(), vars(other).values()))

    def __mul__(self, count: int) -> "StepLoad":
        return StepLoad(*(value * count for value in vars(self).values()))


def row_load(position: int, count: int, *, is_prompt: bool, needs_logits: bool) -> StepLoad:
    """Return the load of ``count`` tokens of one sequence, starting at ``position``."""
    pairs = count * position + count * (count + 1) // 2
    end = position + count
    if is_prompt:
        return StepLoad(count, int(needs_logits), naive_pairs=pairs, naive_keys=end)
    return StepLoad(count, int(needs_logits), absorbed_pairs=pairs, absorbed_keys=end)


def bytes_read(sizes: StageSizes, load: StepLoad) -> float:
    """Return the bytes that a stage reads for a step."""
    experts = expected_experts(sizes.num_experts, sizes.experts_per_token, load.num_tokens)
    head_bytes = sizes.head_bytes if load.num_sampled else 0
    cache_bytes = sizes.position_bytes * (load.absorbed_keys + load.naive_keys)
    return sizes.dense_bytes + head_bytes + sizes.expert_bytes * experts + cache_bytes


def operations(sizes: StageSizes, load: StepLoad) -> float:
    """Return the operations that a stage computes for a step."""
    return (
        sizes.operations_per_token * load.num_tokens
        + sizes.operations_per_expert_token * routed_rows(sizes, load.num_tokens)
        + sizes.operations_per_sampled_token * load.num_sampled
        + sizes.absorbed_operations * load.absorbed_pairs
        + sizes.naive_operations * load.naive_pairs
        + sizes.rebuild_operations * load.naive_keys
    )


@dataclass(frozen=True)
class StageCost:
    """Sizes and speed of one stage."""

    sizes: StageSizes
    speed: StageSpeed

    @property
    def draft_s(self) -> float:
        """The predicted seconds of the draft head for one draft token."""
        reading_s = self.sizes.draft_bytes / self.speed.bytes_per_s
        return reading_s + self.sizes.draft_operations / self.speed.operations_per_s

    def step_s(self, load: StepLoad) -> float:
        """Return the predicted seconds that the stage computes for a step."""
        reading_s = bytes_read(self.sizes, load) / self.speed.bytes_per_s
        return self.speed.fixed_s + reading_s + operations(self.sizes, load) / self.speed.operations_per_s


def expected_experts(num_experts: int, experts_per_token: int, num_tokens: int) -> float:
    """Return the expected number of distinct experts that a layer uses, if each token chooses at random."""
    if num_experts == 0:
        return 0.0
    return num_experts * (1.0 - (1.0 - experts_per_token / num_experts) ** num_tokens)


def routed_rows(sizes: StageSizes, num_tokens: int) -> float:
    """Return how many rows a layer's routed experts compute: one per token and expert, and the empty rows of tiles."""
    if sizes.tile_rows == 1 or num_tokens < _TILES_FROM_TOKENS or sizes.num_experts == 0:
        return num_tokens * sizes.experts_per_token
    tiles = expected_tiles(sizes.num_experts, sizes.experts_per_token, num_tokens, sizes.tile_rows)
    return sizes.tile_rows * tiles


@functools.lru_cache(maxsize=4096)
def expected_tiles(num_experts: int, experts_per_token: int, num_tokens: int, tile_rows: int) -> float:
    """Return the expected number of tiles of all experts, if each token chooses at random.

    The number of an expert's tokens has a binomial distribution. Numbers that differ from the mean by more than 12
    standard deviations are left out.
    """
    probability = experts_per_token / num_experts
    if probability >= 1:
        return float(num_experts * math.ceil(num_tokens / tile_rows))
    mean = num_tokens * probability
    margin = 12 * math.sqrt(mean) + 12
    log_factorial = math.lgamma(num_tokens + 1)
    tiles_per_expert = 0.0
    for count in range(max(1, int(mean - margin)), min(num_tokens, int(mean + margin)) + 1):
        log_ways = log_factorial - math.lgamma(count + 1) - math.lgamma(num_tokens - count + 1)
        log_probability = log_ways + count * math.log(probability) + (num_tokens - count) * math.log1p(-probability)
        tiles_per_expert += math.exp(log_probability) * math.ceil(count / tile_rows)
    return num_experts * tiles_per_expert


def pipeline_s(steps_s: Sequence[Sequence[float]]) -> float:
    """Return the seconds until the last step leaves the last stage. ``steps_s`` has each step's seconds per stage."""
    free_at = [0.0] * len(steps_s[0])
    done_at = 0.0
    for stages_s in steps_s:
        done_at = 0.0
        for stage, seconds in enumerate(stages_s):
            done_at = free_at[stage] = max(done_at, free_at[stage]) + seconds
    return done_at
