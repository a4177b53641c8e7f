"""Tests of the logit bias of a step plan, the sum of the request's bias and its penalties, against a reference."""

import random

import numpy as np

from mlx_k2.sampling import LogitBias, SampledToken, Sampling
from mlx_k2.scheduling.drafter import NgramDrafter
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.sequence import Sequence, SharedPrefix

VOCAB_SIZE = 30


def reference_bias(sampling: Sampling, answer_ids: list[int]) -> list[float]:
    """Return the value that is added to each logit after an answer, in float32."""
    values = dict.fromkeys(range(VOCAB_SIZE), 0.0) | dict(sampling.logit_bias)
    for token_id in set(answer_ids):
        values[token_id] -= sampling.presence_penalty + answer_ids.count(token_id) * sampling.frequency_penalty
    return [float(np.float32(values[token_id])) for token_id in range(VOCAB_SIZE)]


def dense(bias: LogitBias | None) -> np.ndarray:
    """Return the value that a logit bias adds to each logit."""
    values = np.zeros(VOCAB_SIZE, np.float32)
    if bias is not None:
        values[np.frombuffer(bias.token_ids, np.uint32)] = np.frombuffer(bias.values, np.float32)
    return values


class FixedDrafter(NgramDrafter):
    """A drafter that returns the given tokens one after the other."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids

    def index(self, token_ids: object, max_tokens: int) -> bool:
        return False

    def draft(self, token_ids: object, draft_ids: object, min_tokens: int = 0) -> int | None:
        return self.token_ids.pop(0)

    def truncate(self, num_tokens: int) -> None:
        """Do nothing."""


def test_the_bias_of_500_random_answers_with_drafts_and_after_a_restart_equals_the_reference() -> None:
    rng = random.Random(3)
    for seed in range(500):
        sampling = Sampling(
            seed=seed,
            presence_penalty=rng.choice([0.0, rng.uniform(-2, 2)]),
            frequency_penalty=rng.choice([0.0, rng.uniform(-2, 2)]),
            logit_bias=tuple((token_id, rng.uniform(-9, 9)) for token_id in rng.sample(range(VOCAB_SIZE), 3)),
        )
        prompt_ids = tuple(rng.randrange(VOCAB_SIZE) for _ in range(4))
        sequence = Sequence(Request(prompt_ids, 50, sampling, frozenset()), 100)
        answer_ids = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(20))]
        drafts = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(4))]
        sequence.start(0, SharedPrefix(), FixedDrafter(drafts.copy()))
        for number, token_id in enumerate(answer_ids):
            sequence.append_sampled(number, SampledToken(token_id), number + 1)
        end = len(prompt_ids) + len(answer_ids)
        for num_drafts in range(len(drafts) + 1):
            bias = dense(sequence.logit_bias(end + num_drafts))
            expected = reference_bias(sampling, answer_ids + drafts[:num_drafts])
            np.testing.assert_allclose(bias, expected, rtol=2e-7, atol=1e-6)
            if num_drafts < len(drafts):
                sequence.num_planned = end + num_drafts  # as if all tokens before were sent: then a draft is next
                assert sequence.draft() == drafts[num_drafts]
        bias_before = dense(sequence.logit_bias(end))
        sequence.reset(100)
        np.testing.assert_array_equal(dense(sequence.logit_bias(end)), bias_before)


def test_a_plan_has_the_sum_of_bias_and_penalties_and_not_the_parameters() -> None:
    sampling = Sampling(seed=1, presence_penalty=1.0, frequency_penalty=0.5, logit_bias=((3, 1.0),))
    sequence = Sequence(Request((1,), 5, sampling, frozenset()), 100)
    assert sequence.sampling == Sampling(seed=1)
    sequence.append_sampled(0, SampledToken(3), 1)
    assert dense(sequence.logit_bias(2))[3] == 1.0 - (1.0 + 0.5)


def test_without_bias_and_penalties_a_plan_has_no_bias() -> None:
    sequence = Sequence(Request((1,), 5, Sampling(seed=1), frozenset()), 100)
    sequence.append_sampled(0, SampledToken(7), 1)
    assert sequence.logit_bias(2) is None
