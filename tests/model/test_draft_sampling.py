"""Tests of drafts that are sampled with the target's noise: how often both are the same token."""

import hypothesis
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p
from numpy.typing import NDArray

from mlx_k2.model.sampler import SamplingRequest, sample_draft, sample_tokens
from mlx_k2.sampling import LogitBias, Sampling

VOCAB_SIZE = 64
NUM_SAMPLES = 20_000 if hypothesis.settings.get_current_profile_name() == "long" else 1_000


def random_logits(seed: int, scale: float = 2.0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, scale, (1, VOCAB_SIZE)).astype(np.float32))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=5),
        Sampling(seed=6, temperature=0.7, top_p=0.9, repetition_penalty=1.2),
        Sampling(seed=7, top_k=5, min_p=0.05),
        Sampling(seed=8, temperature=0),
    ],
)
def test_every_draft_of_the_targets_own_logits_is_accepted(sampling: Sampling) -> None:
    for position in range(200):
        logits = random_logits(position)
        bias = LogitBias.of({3: 2.0, 9: -1.0})
        request = SamplingRequest(sampling, position, (1, 2, 3), logit_bias=bias)
        (token,) = sample_tokens(logits, [request])
        assert sample_draft(logits, request) == token.token_id


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "sampling"),
    [(0.3, Sampling(seed=11)), (1.0, Sampling(seed=12)), (1.0, Sampling(seed=13, top_p=0.9, temperature=0.8))],
)
def test_drafts_match_as_often_as_the_distance_of_the_distributions_allows(noise: float, sampling: Sampling) -> None:
    """Assert P(match) >= (1 - TV) / (1 + TV) (Daliri, Musco, Suresh, arXiv 2408.07978), minus three standard errors."""
    target = random_logits(1)
    draft = target + noise * random_logits(2, 1.0)
    num_matches = 0
    for position in range(NUM_SAMPLES):
        request = SamplingRequest(sampling, position, ())
        num_matches += sample_draft(target, request) == sample_draft(draft, request)
    distance = 0.5 * np.abs(distribution(target, sampling) - distribution(draft, sampling)).sum()
    bound = (1 - distance) / (1 + distance)
    assert num_matches / NUM_SAMPLES >= bound - 3 * (bound * (1 - bound) / NUM_SAMPLES) ** 0.5


def distribution(logits: mx.array, sampling: Sampling) -> NDArray[np.float32]:
    """Return the probabilities (1, vocabulary) after the filters."""
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if sampling.top_p < 1:
        logprobs = apply_top_p(logprobs, sampling.top_p)
    if sampling.min_p:
        logprobs = apply_min_p(logprobs, sampling.min_p)
    if sampling.top_k is not None:
        logprobs = apply_top_k(logprobs, sampling.top_k)
    return np.array(mx.softmax(logprobs / sampling.temperature, axis=-1))
