"""How long a step takes on a stage: fixed + bytes read / bandwidth + operations / speed. Arithmetic; measures nothing.

Dense weights are read once a microbatch, whatever its size; of the routed experts those that at least one token uses;
of the cache the rows that are attended to.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StageSizes:
    """What one stage reads and computes, all of its layers together; from the model's shapes."""

    dense_bytes: int
    """Everything that each microbatch reads: all but routed experts and head."""
    head_bytes: int
    """Norm and output projection, read when a token is drawn; 0 but for the last stage."""
    expert_bytes: int
    """One routed expert of every layer that has experts."""
    num_experts: int
    experts_per_token: int
    key_bytes: int
    """One position of the cache."""
    operations_per_token: int
    operations_per_sampled_token: int
    absorbed_operations: int
    """Attention of one generated token to one position."""
    naive_operations: int
    """Attention of one prompt token to one position."""
    rebuild_operations: int
    """Making one position's keys and values again, once for each chunk that attends to it."""


@dataclass(frozen=True)
class StageSpeed:
    """What a stage's machine does: seconds a step whatever is in it, bytes and operations a second."""

    fixed_s: float
    bytes_per_s: float
    operations_per_s: float


@dataclass(frozen=True)
class StepLoad:
    """What a step asks of every stage."""

    num_tokens: int = 0
    num_sampled: int = 0
    absorbed_pairs: int = 0
    """Pairs of a generated token and a position that it attends to."""
    naive_pairs: int = 0
    absorbed_keys: int = 0
    """Cached positions that generated tokens read, once for each row."""
    naive_keys: int = 0

    def __add__(self, other: "StepLoad") -> "StepLoad":
        return StepLoad(
            self.num_tokens + other.num_tokens,
            self.num_sampled + other.num_sampled,
            self.absorbed_pairs + other.absorbed_pairs,
            self.naive_pairs + other.naive_pairs,
            self.absorbed_keys + other.absorbed_keys,
            self.naive_keys + other.naive_keys,
        )


def row_load(position: int, count: int, *, is_prompt: bool, needs_logits: bool) -> StepLoad:
    """``count`` tokens of one sequence from ``position`` on."""
    pairs = count * position + count * (count + 1) // 2
    end = position + count
    if is_prompt:
        return StepLoad(count, int(needs_logits), naive_pairs=pairs, naive_keys=end)
    return StepLoad(count, int(needs_logits), absorbed_pairs=pairs, absorbed_keys=end)


def bytes_read(sizes: StageSizes, load: StepLoad) -> float:
    """Bytes that a stage reads for a step."""
    experts = expected_experts(sizes.num_experts, sizes.experts_per_token, load.num_tokens)
    weights = sizes.dense_bytes + (sizes.head_bytes if load.num_sampled else 0) + sizes.expert_bytes * experts
    return weights + sizes.key_bytes * (load.absorbed_keys + load.naive_keys)


def operations(sizes: StageSizes, load: StepLoad) -> int:
    """Operations that a stage computes for a step."""
    return (
        sizes.operations_per_token * load.num_tokens
        + sizes.operations_per_sampled_token * load.num_sampled
        + sizes.absorbed_operations * load.absorbed_pairs
        + sizes.naive_operations * load.naive_pairs
        + sizes.rebuild_operations * load.naive_keys
    )


@dataclass(frozen=True)
class StageCost:
    """One stage: what it reads and computes, and how fast."""

    sizes: StageSizes
    speed: StageSpeed

    def step_s(self, load: StepLoad) -> float:
        """Seconds that it computes for a step."""
        reading_s = bytes_read(self.sizes, load) / self.speed.bytes_per_s
        return self.speed.fixed_s + reading_s + operations(self.sizes, load) / self.speed.operations_per_s


def expected_experts(num_experts: int, experts_per_token: int, num_tokens: int) -> float:
    """How many different experts of a layer are used when each token chooses its own at random."""
    if num_experts == 0:
        return 0.0
    return num_experts * (1.0 - (1.0 - experts_per_token / num_experts) ** num_tokens)


def pipeline_s(stage_steps_s: Iterable[Iterable[float]]) -> float:
    """When the last of several steps leaves the last stage; one inner iterable a step: its seconds on each stage."""
    free_at: list[float] = []
    for steps_s in stage_steps_s:
        done_at = 0.0
        for stage, seconds in enumerate(steps_s):
            if stage == len(free_at):
                free_at.append(0.0)
            done_at = free_at[stage] = max(done_at, free_at[stage]) + seconds
    return free_at[-1] if free_at else 0.0
