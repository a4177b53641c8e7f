"""Tests that the model computes the same as mlx-lm's DeepseekV3, for every variant and any number of stages."""

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from tests.model.chain import Chain, largest_difference, likeliest
from tests.model.checkpoints import VARIANTS, Checkpoint
from tests.model.oracle import load_oracle

TOLERANCE = 2e-4
PROMPT = [(37 * i + 11) % 509 for i in range(48)]
NUM_GENERATED = 16


class MlxLmResults:
    """Results of mlx-lm's ``model``: the prompt's logits, the greedy tokens after it, and the logits after each."""

    def __init__(self, model: Any) -> None:
        cache = make_prompt_cache(model)
        self.prompt_logits: mx.array = model(mx.array([PROMPT]), cache=cache)[0]
        self.token_ids = [likeliest(self.prompt_logits[-1])]
        logits = []
        for _ in range(NUM_GENERATED):
            logits.append(model(mx.array([self.token_ids[-1:]]), cache=cache)[0])
            self.token_ids.append(likeliest(logits[-1][-1]))
        self.decoded_logits = mx.concatenate(logits)

    def check(self, chain: Chain) -> None:
        """Assert that ``chain`` computes the same logits up to rounding, and the same tokens."""
        assert largest_difference(chain.prefill(PROMPT), self.prompt_logits) < TOLERANCE
        decoded_logits = chain.decode(self.token_ids[:-1], len(PROMPT), chunk_tokens=1)
        assert largest_difference(decoded_logits, self.decoded_logits) < TOLERANCE
        assert chain.greedy(PROMPT, NUM_GENERATED + 1, slot=1) == self.token_ids


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def mlx_lm_results(checkpoint: Checkpoint, variant: str) -> MlxLmResults:
    return MlxLmResults(load_oracle(checkpoint(variant)))


@pytest.mark.parametrize("num_stages", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_logits_and_greedy_tokens_equal_mlx_lms(
    checkpoint: Checkpoint, variant: str, mlx_lm_results: MlxLmResults, num_stages: int
) -> None:
    mlx_lm_results.check(Chain(checkpoint(variant), num_stages))
