"""Tests of check_request: a request that can never run is refused with the reason."""

import numpy as np
import pytest

from mlx_k2.errors import RequestError
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import Request, check_request


def check(prompt_ids: tuple[int, ...], max_tokens: int = 5) -> None:
    """Check a request with a vocabulary of 100 tokens and a context of 8."""
    request = Request(prompt_ids, max_tokens, Sampling(seed=0), frozenset())
    check_request(request, vocab_size=100, context_tokens=8)


@pytest.mark.parametrize("prompt_ids", [(0,), (99,), tuple(range(7))])
def test_a_prompt_within_vocabulary_and_context_is_accepted(prompt_ids: tuple[int, ...]) -> None:
    check(prompt_ids)


def test_max_tokens_may_exceed_the_context_length() -> None:
    check((1, 2), max_tokens=1000)


@pytest.mark.parametrize(
    ("prompt_ids", "reason"),
    [
        ((), "the prompt is empty"),
        ((5, 100), "token id 100 is outside the vocabulary of 100"),
        ((-1,), "token id -1 is outside"),
        (tuple(range(8)), "8 tokens and the context holds 8.*larger --context"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused(prompt_ids: tuple[int, ...], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        check(prompt_ids)


def test_a_sampling_parameter_that_a_stage_cannot_read_is_refused_before_it_is_sent() -> None:
    for seed in (np.int64(3), 1.5):
        request = Request((1,), 5, Sampling(seed=seed), frozenset())  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="a sampling parameter has the wrong type"):
            check_request(request, vocab_size=100, context_tokens=8)


def test_max_tokens_0_is_refused() -> None:
    with pytest.raises(RequestError, match="max-tokens is 0: give at least 1"):
        check((1,), max_tokens=0)
