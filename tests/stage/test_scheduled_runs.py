"""Tests of the scheduler's plans on real layers, in float32 on a CPU: a sequence gets the same bits for any plans.

Log-probabilities are compared exactly: they contain every bit of a row's logits that affects sampling.
"""

import random
from collections import deque
from collections.abc import Iterator, Sequence

import mlx.core as mx
import pytest

from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from tests.model.checkpoints import Checkpoint
from tests.scheduling.fake_stages import FixedStepPolicy
from tests.stage.pipeline import Pipeline

NUM_SEQUENCES = 80
CONTEXT_TOKENS = 128
Tokens = list[SampledToken]


def requests() -> list[Request]:
    """Return sampled and greedy, long and short requests. Some begin alike or repeat themselves."""
    sample = random.Random(4)
    beginning = tuple(sample.randrange(500) for _ in range(40))
    asked = []
    for index in range(NUM_SEQUENCES):
        words = tuple(sample.randrange(500) for _ in range(sample.randint(1, 12)))
        prompt_ids = (beginning[: sample.choice([0, 0, 17, 40])] + words * sample.choice([1, 1, 4]))[:80]
        sampling = Sampling(
            seed=index,
            temperature=sample.choice([0.0, 1.0]),
            repetition_penalty=sample.choice([1.0, 1.3]),
            num_logprobs=3,
        )
        asked.append(Request(prompt_ids, sample.randint(1, 14), sampling, frozenset({7})))
    return asked


def run(pipeline: Pipeline, scheduler: Scheduler, asked: Sequence[Request]) -> list[Tokens]:
    """Submit all requests at once and return the tokens of each."""
    for request in asked:
        scheduler.submit(request)
    tokens: dict[int, Tokens] = {id(request): [] for request in asked}
    waiting: deque[tuple[int, tuple[SampledToken, ...], bool]] = deque()
    while scheduler.has_work:
        while (microbatch := scheduler.next_microbatch()) is not None:
            sampled = pipeline.tokens(*(planned.row for planned in microbatch.rows))
            is_skipped = not sampled and all(planned.row.is_draft for planned in microbatch.rows)
            waiting.append((microbatch.number, sampled, is_skipped))
        number, sampled, is_skipped = waiting.popleft()
        for added in scheduler.complete(number, sampled, is_skipped=is_skipped):
            tokens[id(added.sequence.request)] += [appended.token for appended in added.tokens]
    return [tokens[id(request)] for request in asked]


@pytest.fixture(scope="module", autouse=True)
def without_compiling() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def alone(checkpoint: Checkpoint) -> list[Tokens]:
    """Return the tokens of one stage: one sequence after the other, whole prompts, nothing shared, no drafts."""
    pipeline = Pipeline(checkpoint("thinking"), 1)
    limits = SchedulerLimits(num_slots=1, context_tokens=CONTEXT_TOKENS, chunk_tokens=CONTEXT_TOKENS, num_stages=1)
    policy = FixedStepPolicy(num_microbatches=1, chunk=CONTEXT_TOKENS, beside=CONTEXT_TOKENS)
    return [run(pipeline, Scheduler(limits, policy), [request])[0] for request in requests()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_stages", "chunk_tokens", "num_slots", "drafts"),
    [(1, 1, 4, False), (2, 7, 3, False), (2, 64, 1, True), (3, 64, 4, True), (3, 128, 2, False)],
)
def test_a_sequence_is_bit_identical_for_any_batch_chunks_stages_and_drafts(
    checkpoint: Checkpoint, alone: list[Tokens], num_stages: int, chunk_tokens: int, num_slots: int, drafts: bool
) -> None:
    pipeline = Pipeline(checkpoint("thinking"), num_stages)
    limits = SchedulerLimits(
        num_slots=num_slots, context_tokens=CONTEXT_TOKENS, chunk_tokens=chunk_tokens, num_stages=num_stages
    )
    scheduler = Scheduler(
        limits,
        FixedStepPolicy(2, chunk_tokens, max(1, chunk_tokens // 4)),
        draft_mode=DraftMode.NGRAM if drafts else DraftMode.OFF,
    )
    assert run(pipeline, scheduler, requests()) == alone
