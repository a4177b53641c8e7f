"""Tests of the scheduler's plans on real layers, in float32 on a CPU: the plans do not change a sequence's logits.

Log-probabilities are compared exactly, because a change of the logits would change them.
"""

import random
from collections import deque
from collections.abc import Sequence

import pytest

from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from tests.model.checkpoints import Checkpoint
from tests.scheduling.fake_stages import FixedStepPolicy
from tests.stage.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("as_a_stage_on_a_cpu")

NUM_SEQUENCES = 80
CONTEXT_TOKENS = 128
Tokens = list[SampledToken]


def requests() -> list[Request]:
    """Return random requests, sampled and greedy. Some prompts begin alike, and some repeat themselves."""
    chance = random.Random(4)
    beginning = tuple(chance.randrange(500) for _ in range(40))
    random_requests = []
    for index in range(NUM_SEQUENCES):
        words = tuple(chance.randrange(500) for _ in range(chance.randint(1, 12)))
        prompt_ids = (beginning[: chance.choice([0, 0, 17, 40])] + words * chance.choice([1, 1, 4]))[:80]
        sampling = Sampling(
            seed=index,
            temperature=chance.choice([0.0, 1.0]),
            repetition_penalty=chance.choice([1.0, 1.3]),
            num_logprobs=3,
        )
        max_tokens = chance.randint(1, 14)
        random_requests.append(Request(prompt_ids, max_tokens, sampling, stop_ids=frozenset({7})))
    return random_requests


def run(pipeline: Pipeline, scheduler: Scheduler, submitted: Sequence[Request]) -> list[Tokens]:
    """Submit all requests at once; return the tokens of each."""
    for request in submitted:
        scheduler.submit(request)
    tokens: dict[int, Tokens] = {id(request): [] for request in submitted}
    in_flight: deque[tuple[int, tuple[SampledToken, ...], bool]] = deque()
    while scheduler.has_work:
        while (microbatch := scheduler.next_microbatch()) is not None:
            sampled = pipeline.tokens(*(planned.row for planned in microbatch.rows))
            is_skipped = not sampled and all(planned.row.is_draft for planned in microbatch.rows)
            in_flight.append((microbatch.number, sampled, is_skipped))
        number, sampled, is_skipped = in_flight.popleft()
        for result in scheduler.complete(number, sampled, is_skipped=is_skipped):
            tokens[id(result.sequence.request)] += [appended.token for appended in result.tokens]
    return [tokens[id(request)] for request in submitted]


@pytest.fixture(scope="module")
def tokens_alone(checkpoint: Checkpoint) -> list[Tokens]:
    """Return the tokens of each request when it runs alone on one stage, without chunks, reused prefixes and drafts."""
    pipeline = Pipeline(checkpoint("thinking"), 1)
    limits = SchedulerLimits(num_slots=1, context_tokens=CONTEXT_TOKENS, chunk_tokens=CONTEXT_TOKENS, num_stages=1)
    policy = FixedStepPolicy(num_microbatches=1, lone_chunk_tokens=CONTEXT_TOKENS, beside_chunk_tokens=CONTEXT_TOKENS)
    return [run(pipeline, Scheduler(limits, policy), [request])[0] for request in requests()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_stages", "chunk_tokens", "num_slots", "drafts"),
    [(1, 1, 4, False), (2, 7, 3, False), (2, 64, 1, True), (3, 64, 4, True), (3, 128, 2, False)],
)
def test_a_sequence_is_bit_identical_for_any_batch_chunks_stages_and_drafts(
    checkpoint: Checkpoint, tokens_alone: list[Tokens], num_stages: int, chunk_tokens: int, num_slots: int, drafts: bool
) -> None:
    pipeline = Pipeline(checkpoint("thinking"), num_stages)
    limits = SchedulerLimits(
        num_slots=num_slots, context_tokens=CONTEXT_TOKENS, chunk_tokens=chunk_tokens, num_stages=num_stages
    )
    scheduler = Scheduler(
        limits,
        FixedStepPolicy(
            num_microbatches=2, lone_chunk_tokens=chunk_tokens, beside_chunk_tokens=max(1, chunk_tokens // 4)
        ),
        draft_mode=DraftMode.NGRAM if drafts else DraftMode.OFF,
    )
    assert run(pipeline, scheduler, requests()) == tokens_alone
