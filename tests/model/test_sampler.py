"""Tests of the sampler: tokens follow the sampling parameters, and all randomness comes from (seed, position)."""

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_k2.model.sampler import SamplingRequest, sample_tokens
from mlx_k2.sampling import REPETITION_WINDOW, LogitBias, SampledToken, Sampling
from mlx_k2.token_mask import MaskForm, TokenMask

NUM_SAMPLES = 2000
LAST_POSITION = 262143  # of Kimi K2's context
LOGITS = [2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -20.0]


def sample(
    logits: list[float], sampling: Sampling, position: int = 0, recent_ids: tuple[int, ...] = ()
) -> SampledToken:
    (sampled,) = sample_tokens(mx.array([logits]), [SamplingRequest(sampling, position, recent_ids)])
    return sampled


def token_counts(sampling: Sampling, recent_ids: tuple[int, ...] = ()) -> NDArray[np.int64]:
    """Return how often each token is sampled from LOGITS at NUM_SAMPLES positions."""
    requests = [SamplingRequest(sampling, position, recent_ids) for position in range(NUM_SAMPLES)]
    samples = sample_tokens(mx.array([LOGITS] * NUM_SAMPLES), requests)
    return np.bincount([sampled.token_id for sampled in samples], minlength=len(LOGITS))


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials = np.exp(logits - logits.max())
    return np.asarray(exponentials / exponentials.sum())


def are_distributed(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> bool:
    """Return whether tokens of a probability below 1e-6 never occur and the others pass Pearson's test (p > 0.001)."""
    possible = probabilities > 1e-6
    expected = probabilities[possible] * NUM_SAMPLES
    chi_square = float(((counts[possible] - expected) ** 2 / expected).sum())
    bound_by_degrees_of_freedom = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5}
    return counts[~possible].sum() == 0 and chi_square < bound_by_degrees_of_freedom[int(possible.sum()) - 1]


def probabilities_of(token_ids: list[int], temperature: float = 1.0) -> NDArray[np.float64]:
    """Return the softmax of LOGITS over ``token_ids``, with 0 for all other tokens."""
    logits = np.full(len(LOGITS), -np.inf)
    logits[token_ids] = np.array(LOGITS)[token_ids] / temperature
    return softmax(logits)


ALL = list(range(len(LOGITS)))


@pytest.mark.parametrize(
    ("sampling", "probabilities"),
    [
        (Sampling(seed=1), probabilities_of(ALL)),
        (Sampling(seed=2, temperature=2.0), probabilities_of(ALL[:-1], 2.0)),  # the last one's probability is 4e-6
        (Sampling(seed=3, temperature=0.5), probabilities_of(ALL, 0.5)),
        (Sampling(seed=4, top_k=3), probabilities_of([0, 1, 2])),
        (Sampling(seed=5, top_k=len(LOGITS)), probabilities_of(ALL)),
        (Sampling(seed=6, top_k=10 * len(LOGITS)), probabilities_of(ALL)),
        (Sampling(seed=7, top_p=0.6), probabilities_of([0, 1])),
        (Sampling(seed=8, top_p=0.999999), probabilities_of(ALL[:-1])),
        (Sampling(seed=9, min_p=0.3), probabilities_of([0, 1, 2])),
        (Sampling(seed=10, top_p=0.9, min_p=0.2, top_k=3, temperature=1.5), probabilities_of([0, 1, 2], 1.5)),
    ],
)
def test_tokens_are_sampled_with_the_probabilities_of_the_filtered_softmax(
    sampling: Sampling, probabilities: NDArray[np.float64]
) -> None:
    assert are_distributed(token_counts(sampling), probabilities)


def test_the_distribution_test_rejects_a_wrong_distribution() -> None:
    assert not are_distributed(token_counts(Sampling(seed=1, temperature=1.2)), probabilities_of(ALL))


def test_a_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    penalized = np.array(LOGITS)
    penalized[[0, 1]] /= 3.0
    penalized[6] *= 3.0
    counts = token_counts(Sampling(seed=11, repetition_penalty=3.0), recent_ids=(0, 1, 6, 0))
    assert are_distributed(counts, softmax(penalized))


def test_the_repetition_penalty_applies_only_to_recent_tokens() -> None:
    sampling = Sampling(seed=0, temperature=0, repetition_penalty=10.0)
    for num_later_tokens, expected in ((REPETITION_WINDOW, 0), (REPETITION_WINDOW - 1, 1)):
        recent_ids = (0,) + (5,) * num_later_tokens
        assert sample(LOGITS, sampling, recent_ids=recent_ids).token_id == expected


def test_temperature_0_samples_the_likeliest_token_for_any_seed_and_filters() -> None:
    for seed in range(20):
        sampled = sample([-20.0, 2.0, 1.5, 1.0], Sampling(seed=seed, temperature=0, top_k=2, min_p=0.1))
        assert sampled.token_id == 1


def test_a_tiny_temperature_or_a_filter_that_keeps_one_token_is_greedy() -> None:
    for position in range(50):
        for sampling in (Sampling(seed=1, temperature=1e-6), Sampling(seed=1, top_k=1), Sampling(seed=1, top_p=1e-6)):
            assert sample(LOGITS, sampling, position).token_id == 0


def test_a_sampled_token_does_not_depend_on_the_other_rows() -> None:
    generator = np.random.default_rng(0)
    logits = mx.array(generator.normal(size=(6, 300)).astype(np.float32))
    requests = [
        SamplingRequest(Sampling(seed=1), position=0, recent_ids=()),
        SamplingRequest(Sampling(seed=1, top_p=0.9, repetition_penalty=1.3), position=1, recent_ids=(1, 2, 3)),
        SamplingRequest(Sampling(seed=2, top_p=0.5), position=2, recent_ids=()),
        SamplingRequest(Sampling(seed=2**63 - 1, repetition_penalty=1.3), LAST_POSITION, recent_ids=(1, 2, 3)),
        SamplingRequest(Sampling(seed=0, top_p=0.9), position=4, recent_ids=()),
        SamplingRequest(Sampling(seed=7, top_p=0.3, repetition_penalty=1.3), position=5, recent_ids=(1, 2, 3)),
    ]
    one_by_one = [sample_tokens(logits[row : row + 1], [request])[0] for row, request in enumerate(requests)]
    assert sample_tokens(logits, requests) == one_by_one


def test_seeds_and_positions_give_independent_samples() -> None:
    flat = [0.0] * 1000
    by_seed = [sample(flat, Sampling(seed=seed), 5).token_id for seed in range(200)]
    by_position = [sample(flat, Sampling(seed=5), position).token_id for position in range(200)]
    for token_ids in (by_seed, by_position):
        assert 160 < len(set(token_ids)) < 200  # about 181 different ones are expected in 200 samples of 1000 tokens
    assert by_seed != by_position
    assert by_position == [sample(flat, Sampling(seed=5), position).token_id for position in range(200)]


def test_logprobs_are_computed_before_penalty_filters_and_temperature() -> None:
    sampling = Sampling(seed=3, temperature=0.1, top_k=2, repetition_penalty=5.0, num_logprobs=3)
    sampled = sample(LOGITS, sampling, recent_ids=(0, 1, 2))
    expected = np.log(softmax(np.array(LOGITS)))
    assert sampled.logprob == pytest.approx(expected[sampled.token_id], abs=1e-5)
    assert [token_id for token_id, _ in sampled.top] == [0, 1, 2]
    assert [value for _, value in sampled.top] == pytest.approx(expected[:3], abs=1e-5)


def test_logprobs_are_returned_only_on_request() -> None:
    without, with_0, with_50 = (sample(LOGITS, Sampling(seed=0, num_logprobs=number)) for number in (None, 0, 50))
    assert (without.logprob, without.top) == (None, ())
    assert with_0.logprob is not None
    assert with_0.top == ()
    assert len(with_50.top) == len(LOGITS)


@pytest.mark.parametrize("form", MaskForm)
def test_masks_biases_and_penalties_change_logits_as_a_plain_reference_does(form: MaskForm) -> None:
    random = np.random.default_rng(7)
    for case in range(170):
        vocab_size = int(random.integers(2, 300))
        logits = random.normal(0, 3, vocab_size).astype(np.float32)
        allowed = random.random(vocab_size) < random.choice([0.05, 0.5, 0.95])
        allowed[random.integers(vocab_size)] = True
        recent_ids = tuple(random.integers(0, vocab_size, int(random.integers(0, 20))).tolist())
        biases = {int(token_id): float(random.normal(0, 4)) for token_id in random.integers(0, vocab_size, 5)}
        temperature = float(random.choice([0.0, 1.0]))
        penalty = float(random.choice([1.0, 1.3]))

        expected = np.where(allowed, logits, np.float32(-np.inf))
        if penalty != 1.0:
            for token_id in set(recent_ids):
                factor = penalty if expected[token_id] < 0 else 1 / penalty
                expected[token_id] *= np.float32(factor)
        for token_id, bias in biases.items():
            expected[token_id] += np.float32(bias)

        sampling = Sampling(seed=case, temperature=temperature, repetition_penalty=penalty)
        mask = TokenMask(form, mask_data(form, allowed))
        request = SamplingRequest(
            sampling, position=case, recent_ids=recent_ids, token_mask=mask, logit_bias=LogitBias.of(biases)
        )
        (actual_token,) = sample_tokens(mx.array(logits[None]), [request])
        without_penalty = Sampling(seed=case, temperature=temperature)
        (expected_token,) = sample_tokens(
            mx.array(expected[None]), [SamplingRequest(without_penalty, position=case, recent_ids=())]
        )
        assert actual_token.token_id == expected_token.token_id
        assert [mask.allows(token_id) for token_id in range(vocab_size)] == allowed.tolist()


def mask_data(form: MaskForm, allowed: NDArray[np.bool_]) -> bytes:
    """Return the data of a mask in one of its forms."""
    if form is MaskForm.BITS:
        return np.packbits(allowed, bitorder="little").tobytes()
    return np.flatnonzero(allowed if form is MaskForm.ONLY else ~allowed).astype("<u4").tobytes()


def test_rows_of_a_step_have_masks_of_their_own() -> None:
    masks = [TokenMask.only([5]), None, TokenMask.all_but([0, 1, 2]), TokenMask.only([7])]
    sampling = Sampling(seed=0, temperature=0)
    requests = [SamplingRequest(sampling, position=0, recent_ids=(), token_mask=mask) for mask in masks]
    tokens = sample_tokens(mx.array([LOGITS] * 4), requests)
    assert [token.token_id for token in tokens] == [5, 0, 3, 7]


def test_log_probabilities_are_those_of_the_allowed_tokens_without_bias() -> None:
    bias = LogitBias.of({2: 50.0})
    request = SamplingRequest(
        Sampling(seed=0, num_logprobs=2), position=0, recent_ids=(), token_mask=TokenMask.only([1, 2]), logit_bias=bias
    )
    (token,) = sample_tokens(mx.array([LOGITS]), [request])
    assert token.token_id == 2
    assert [token_id for token_id, _ in token.top] == [1, 2]
    assert token.logprob == pytest.approx(float(np.log(probabilities_of([1, 2])[2])), abs=1e-6)
