"""Tests of the logit bias that the last stage gets, the sum of bias and penalties, against a reference."""

import random

import numpy as np

from mlx_k2.sampling import LogitBias, SampledToken, Sampling
from mlx_k2.scheduling.drafter import NgramDrafter
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.sequence import Sequence, SharedPrefix

VOCAB_SIZE = 30


def reference(sampling: Sampling, generated: list[int]) -> list[float]:
    """Return the bias of each logit after the ``generated`` tokens, in float32."""
    biases = dict.fromkeys(range(VOCAB_SIZE), 0.0) | dict(sampling.logit_bias)
    for token_id in set(generated):
        count = generated.count(token_id)
        biases[token_id] -= sampling.presence_penalty + count * sampling.frequency_penalty
    return [float(np.float32(biases[token_id])) for token_id in range(VOCAB_SIZE)]


def dense(bias: LogitBias | None) -> list[float]:
    """Return the bias of each logit of the vocabulary."""
    biases = np.zeros(VOCAB_SIZE, np.float32)
    if bias is not None:
        biases[np.frombuffer(bias.token_ids, np.uint32)] = np.frombuffer(bias.values, np.float32)
    return [float(value) for value in biases]


class ScriptedDrafter(NgramDrafter):
    """A drafter that proposes given tokens."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids

    def index(self, token_ids: object, max_tokens: int) -> bool:
        return False

    def draft(self, token_ids: object, draft_ids: object, min_tokens: int = 0) -> int | None:
        return self.token_ids.pop(0)

    def truncate(self, num_tokens: int) -> None:
        """Do nothing."""


def test_bias_and_penalties_count_the_tokens_of_the_answer_as_a_plain_reference_does() -> None:
    rng = random.Random(3)
    for case in range(500):
        sampling = Sampling(
            seed=case,
            presence_penalty=rng.choice([0.0, rng.uniform(-2, 2)]),
            frequency_penalty=rng.choice([0.0, rng.uniform(-2, 2)]),
            logit_bias=tuple((number, rng.uniform(-9, 9)) for number in rng.sample(range(VOCAB_SIZE), 3)),
        )
        prompt_ids = tuple(rng.randrange(VOCAB_SIZE) for _ in range(4))
        sequence = Sequence(Request(prompt_ids, 50, sampling, frozenset()), 100)
        generated = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(20))]
        drafts = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(4))]
        sequence.start(0, SharedPrefix(), ScriptedDrafter(drafts.copy()))
        for number, token_id in enumerate(generated):
            sequence.append_sampled(number, SampledToken(token_id), number + 1)
        end = len(prompt_ids) + len(generated)
        for count in range(len(drafts) + 1):
            biases = dense(sequence.logit_bias(end + count))
            np.testing.assert_allclose(biases, reference(sampling, generated + drafts[:count]), rtol=2e-7, atol=1e-6)
            if count < len(drafts):
                sequence.num_planned = end + count
                assert sequence.draft() == drafts[count]
        before = dense(sequence.logit_bias(end))
        sequence.reset(next_plan=100)
        assert dense(sequence.logit_bias(end)) == before
        np.testing.assert_allclose(dense(sequence.logit_bias(end)), reference(sampling, generated), atol=1e-6)


def test_the_last_stage_gets_the_sum_of_bias_and_penalties_and_not_the_parameters() -> None:
    sampling = Sampling(seed=1, presence_penalty=1.0, frequency_penalty=0.5, logit_bias=((3, 1.0),))
    sequence = Sequence(Request((1,), 5, sampling, frozenset()), 100)
    assert sequence.sampling == Sampling(seed=1)
    assert dense(sequence.logit_bias(1))[3] == 1.0


def test_without_bias_and_penalties_a_row_has_no_logit_bias() -> None:
    sequence = Sequence(Request((1,), 5, Sampling(seed=1), frozenset()), 100)
    sequence.append_sampled(0, SampledToken(7), 1)
    assert sequence.logit_bias(2) is None
