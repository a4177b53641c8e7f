"""Tests of steps on a pipeline of real layers: the tokens do not depend on the stages, the chunks or the batch."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.microbatch import Row
from tests.model.checkpoints import Checkpoint
from tests.model.oracle import load_oracle
from tests.stage.pipeline import Pipeline, recent_ids

pytestmark = pytest.mark.usefixtures("as_a_stage_on_a_cpu")

PROMPT = [(41 * index + 9) % 509 for index in range(70)]
NUM_TOKENS = 24
GREEDY = Sampling(seed=0, temperature=0)
SAMPLINGS = (
    Sampling(seed=1),
    Sampling(seed=2, temperature=0.7, top_p=0.9, repetition_penalty=1.2, num_logprobs=5),
    Sampling(seed=2**63 - 1, top_k=40, min_p=0.01),
    GREEDY,
)


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> list[list[SampledToken]]:
    """Return the tokens that one stage samples, one sequence after the other."""
    pipeline = Pipeline(checkpoint("thinking"), 1)
    return [pipeline.generate(PROMPT, sampling, NUM_TOKENS) for sampling in SAMPLINGS]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_logprobs_and_greedy_tokens_equal_mlx_lms(checkpoint: Checkpoint, num_stages: int) -> None:
    oracle = load_oracle(checkpoint("k25"))
    cache = make_prompt_cache(oracle)
    sampling = Sampling(seed=0, temperature=0, num_logprobs=100)
    pending = PROMPT
    for token in Pipeline(checkpoint("k25"), num_stages).generate(PROMPT, sampling, 12, chunk_tokens=len(PROMPT)):
        logits = oracle(mx.array([pending]), cache=cache)[0, -1]
        logprobs = np.asarray(logits - mx.logsumexp(logits))
        assert token.token_id == int(np.argmax(logprobs))
        assert token.logprob == pytest.approx(logprobs[token.token_id], abs=2e-4)
        assert [value for _, value in token.top] == pytest.approx(np.sort(logprobs)[::-1][:100], abs=2e-4)
        pending = [token.token_id]


@pytest.mark.parametrize(
    ("num_stages", "chunk_tokens"), [pytest.param(1, 7, marks=pytest.mark.slow), (2, 64), (3, 70), (7, 33)]
)
def test_the_same_seed_gives_the_same_tokens_for_any_stages_and_chunks(
    checkpoint: Checkpoint, expected: list[list[SampledToken]], num_stages: int, chunk_tokens: int
) -> None:
    pipeline = Pipeline(checkpoint("thinking"), num_stages)
    for sampling, tokens in zip(SAMPLINGS, expected, strict=True):
        assert pipeline.generate(PROMPT, sampling, NUM_TOKENS, chunk_tokens=chunk_tokens) == tokens


def test_sequences_in_one_microbatch_get_the_same_tokens_as_alone(
    checkpoint: Checkpoint, expected: list[list[SampledToken]]
) -> None:
    pipeline = Pipeline(checkpoint("thinking"), 2)
    recent = recent_ids(PROMPT)
    prompts = [
        Row(slot, position=0, token_ids=tuple(PROMPT), is_prompt=True, sampling=sampling, recent_ids=recent)
        for slot, sampling in enumerate(SAMPLINGS)
    ]
    sequences = [[token] for token in pipeline.tokens(*prompts)]
    for _ in range(NUM_TOKENS - 1):
        rows = []
        for slot, sampling in enumerate(SAMPLINGS):
            token_ids = [*PROMPT, *(token.token_id for token in sequences[slot])]
            position, recent = len(token_ids) - 1, recent_ids(token_ids)
            rows.append(Row(slot, position, (token_ids[-1],), is_prompt=False, sampling=sampling, recent_ids=recent))
        for sequence, token in zip(sequences, pipeline.tokens(*rows), strict=True):
            sequence.append(token)
    assert sequences == expected


def test_new_stages_that_compute_the_known_tokens_again_sample_the_same_next_token(
    checkpoint: Checkpoint, expected: list[list[SampledToken]]
) -> None:
    num_known = 15
    known_ids = tuple(token.token_id for token in expected[0][:num_known])
    pipeline = Pipeline(checkpoint("thinking"), 3)
    assert pipeline.tokens(Row(slot=0, position=0, token_ids=tuple(PROMPT), is_prompt=True, sampling=None)) == ()
    recent = recent_ids([*PROMPT, *known_ids])
    answer = Row(
        slot=0, position=len(PROMPT), token_ids=known_ids, is_prompt=False, sampling=SAMPLINGS[0], recent_ids=recent
    )
    assert pipeline.tokens(answer) == (expected[0][num_known],)


def test_a_row_without_sampling_returns_no_token_and_fills_the_cache(
    checkpoint: Checkpoint, expected: list[list[SampledToken]]
) -> None:
    pipeline = Pipeline(checkpoint("thinking"), 2)
    chunk = Row(slot=0, position=0, token_ids=tuple(PROMPT[:-1]), is_prompt=True, sampling=None)
    prompt = Row(slot=1, position=0, token_ids=tuple(PROMPT), is_prompt=True, sampling=GREEDY)
    first_token = expected[SAMPLINGS.index(GREEDY)][0]
    assert pipeline.tokens(chunk, prompt) == (first_token,)
    last = Row(slot=0, position=len(PROMPT) - 1, token_ids=(PROMPT[-1],), is_prompt=True, sampling=GREEDY)
    assert pipeline.tokens(last) == (first_token,)


def test_a_prefix_copied_from_another_slot_gives_the_same_token_as_a_computed_one(
    checkpoint: Checkpoint, expected: list[list[SampledToken]]
) -> None:
    pipeline = Pipeline(checkpoint("thinking"), 2)
    num_shared = 40
    other = (*PROMPT[:num_shared], 1, 2, 3)
    pipeline.tokens(Row(slot=2, position=0, token_ids=other, is_prompt=True, sampling=None))
    rest, recent = tuple(PROMPT[num_shared:]), recent_ids(PROMPT)
    row = Row(
        slot=1,
        position=num_shared,
        token_ids=rest,
        is_prompt=True,
        sampling=SAMPLINGS[0],
        recent_ids=recent,
        copy_from=2,
    )
    assert pipeline.tokens(row) == (expected[0][0],)


def test_every_stage_answers_each_step_with_its_number_and_times(checkpoint: Checkpoint) -> None:
    pipeline = Pipeline(checkpoint("thinking"), 3)
    for number in (1, 2):
        answers = pipeline.step(Row(slot=0, position=0, token_ids=tuple(PROMPT), is_prompt=True, sampling=GREEDY))
        assert [done.number for done in answers] == [number] * 3
        assert all(done.busy_s > 0 and done.receive_s >= 0 and done.send_s >= 0 for done in answers)
        assert answers[0].receive_s == answers[-1].send_s == 0
