"""Simulation of a scheduler over stages whose steps take the time of the cost model."""

import functools
import itertools
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_k2.config import ModelConfig
from mlx_k2.deployment.stage_costs import GPU_TILE_ROWS, stage_sizes
from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.cost_model import StageCost, StageSizes, StageSpeed
from mlx_k2.scheduling.microbatch import Microbatch
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.step_policy import DecodeRound, StepPolicy
from mlx_k2.weights.known_layout import thinking_config_fields

SPEED = StageSpeed(fixed_s=0.003, bytes_per_s=0.7e12, operations_per_s=15e12)
TURNAROUND_S = 0.001
CONFIG = ModelConfig.from_json(json.dumps(thinking_config_fields()).encode(), "Kimi K2 Thinking")
STAGE_BOUNDS = {1: (0, 61), 2: (0, 32, 61), 4: (0, 16, 31, 46, 61)}
"""The first layer of each stage and the end of the last one, by number of stages, as the partition chooses them."""
MAX_CHUNK_TOKENS = 8192


@functools.cache
def k2_sizes(num_stages: int) -> list[StageSizes]:
    """Return the sizes of the stages of Kimi K2."""
    return [
        stage_sizes(CONFIG, first, end, compute_bytes=2, tile_rows=GPU_TILE_ROWS)
        for first, end in itertools.pairwise(STAGE_BOUNDS[num_stages])
    ]


def k2_stages(num_stages: int = 2, speed: StageSpeed = SPEED) -> list[StageCost]:
    """Return the costs of the stages of Kimi K2 on machines of the same speed."""
    return [StageCost(sizes, speed) for sizes in k2_sizes(num_stages)]


class FixedChoices(StepPolicy):
    """The step policy with a fixed number of microbatches and, except beside decode rows, a fixed length of chunks."""

    def __init__(self, stages: Sequence[StageCost], num_microbatches: int, chunk_tokens: int) -> None:
        super().__init__(stages, TURNAROUND_S)
        self._num_microbatches = num_microbatches
        self._chunk_tokens = chunk_tokens

    def decode_round(self, num_sequences: int, mean_context: int) -> DecodeRound:
        decode_round = super().decode_round(num_sequences, mean_context)
        return DecodeRound(min(num_sequences, self._num_microbatches), decode_round.round_s)

    def chunk_tokens(self, position: int, num_tokens: int, longest: int) -> int:
        return min(self._chunk_tokens, longest)


def request(num_prompt: int, max_tokens: int, seed: int = 0, *, has_common_prefix: bool = False) -> Request:
    """Return a request. Prompts of different seeds differ in one token: the first, or with a common prefix the last."""
    common_ids = tuple(range(1, num_prompt))
    own_id = 1_000_000 + seed
    prompt_ids = (*common_ids, own_id) if has_common_prefix else (own_id, *common_ids)
    return Request(prompt_ids, max_tokens, Sampling(seed=0), frozenset())


@dataclass
class Simulation:
    """A scheduler over simulated stages. Times are seconds from the start."""

    stages: list[StageCost]
    policy: StepPolicy
    num_slots: int
    context_tokens: int = 70_000
    now_s: float = 0.0
    token_times: dict[int, list[float]] = field(default_factory=dict)
    """Arrival times of the tokens of each request, by the request's id()."""

    def __post_init__(self) -> None:
        limits = SchedulerLimits(self.num_slots, self.context_tokens, MAX_CHUNK_TOKENS, len(self.stages))
        self.scheduler = Scheduler(limits, self.policy)
        self._free_at = [0.0] * len(self.stages)
        self._in_flight: deque[tuple[float, Microbatch]] = deque()

    def run(self, *requests: Request, until_s: float = float("inf")) -> None:
        """Submit the requests and run to the end, or until ``until_s``."""
        for submitted in requests:
            self.scheduler.submit(submitted)
        while self.scheduler.has_work and self.now_s < until_s:
            while (microbatch := self.scheduler.next_microbatch()) is not None:
                self._in_flight.append((self._send(microbatch), microbatch))
            self._receive(*self._in_flight.popleft())

    def _send(self, microbatch: Microbatch) -> float:
        """Return the time at which the last stage finishes the microbatch."""
        done_s = self.now_s + TURNAROUND_S
        for rank, stage in enumerate(self.stages):
            done_s = self._free_at[rank] = max(done_s, self._free_at[rank]) + stage.step_s(microbatch.load)
        return done_s

    def _receive(self, done_s: float, microbatch: Microbatch) -> None:
        self.now_s = done_s
        sampled_sequences = [planned.sequence for planned in microbatch.rows if planned.row.needs_logits]
        self.scheduler.complete(microbatch.number, [SampledToken(1)] * len(sampled_sequences))
        for sequence in sampled_sequences:
            self.token_times.setdefault(id(sequence.request), []).append(done_s)
