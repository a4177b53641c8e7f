"""Tests of determinism: in float32 on a CPU a sequence's logits are bit-identical for any chunks, batch and stages."""

import mlx.core as mx
import pytest

from mlx_k2.model.batch import Span
from tests.model.chain import Chain
from tests.model.checkpoints import Checkpoint

PROMPT = [(53 * i + 7) % 509 for i in range(100)]
GENERATED = [(29 * i + 3) % 509 for i in range(34)]
COMPANY = [(71 * i + 1) % 509 for i in range(90)]


@pytest.fixture(scope="module", params=["thinking", "direct query, groups"])
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def prompt_logits(checkpoint: Checkpoint, variant: str) -> mx.array:
    """Return the logits of the whole prompt, in one stage, alone."""
    return Chain(checkpoint(variant), 1).prefill(PROMPT)


@pytest.fixture(scope="module")
def generated_logits(checkpoint: Checkpoint, variant: str) -> mx.array:
    """Return the logits after the whole prompt, token by token, in one stage, alone."""
    chain = Chain(checkpoint(variant), 1)
    chain.prefill(PROMPT)
    return chain.decode(GENERATED, len(PROMPT), chunk_tokens=1)


@pytest.mark.parametrize("num_stages", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("chunk_tokens", [pytest.param(1, marks=pytest.mark.slow), 7, 64, None])
def test_prompt_logits_are_bit_identical_for_any_chunks_and_stages(
    checkpoint: Checkpoint, variant: str, prompt_logits: mx.array, num_stages: int, chunk_tokens: int | None
) -> None:
    logits = Chain(checkpoint(variant), num_stages).prefill(PROMPT, chunk_tokens=chunk_tokens)
    assert mx.array_equal(logits, prompt_logits)


@pytest.mark.parametrize("num_stages", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("chunk_tokens", [1, 7, None])
def test_generated_tokens_recomputed_after_a_restart_have_identical_logits(
    checkpoint: Checkpoint, variant: str, generated_logits: mx.array, num_stages: int, chunk_tokens: int | None
) -> None:
    chain = Chain(checkpoint(variant), num_stages)
    chain.prefill(PROMPT, chunk_tokens=64)
    again = chain.decode(GENERATED, len(PROMPT), chunk_tokens=chunk_tokens)
    assert mx.array_equal(again, generated_logits)


def test_other_sequences_in_a_batch_do_not_change_the_logits(
    checkpoint: Checkpoint, variant: str, prompt_logits: mx.array, generated_logits: mx.array
) -> None:
    chain = Chain(checkpoint(variant), 2)
    chain.prefill(COMPANY, slot=2)
    together = []
    for start in range(0, len(PROMPT), 50):
        decoding = Span(2, len(COMPANY) + start // 50, 1, is_prompt=False)
        chunk = Span(0, start, 50, is_prompt=True)
        other = Span(1, start, 50, is_prompt=True)
        part = PROMPT[start : start + 50]
        together.append(chain.run((decoding, [start]), (chunk, part), (other, part[::-1]))[1:51])
    assert mx.array_equal(mx.concatenate(together), prompt_logits)
    for index, token_id in enumerate(GENERATED):
        alone = Span(0, len(PROMPT) + index, 1, is_prompt=False)
        drafting = Span(2, len(COMPANY) + 3 + index, 4, is_prompt=False)
        logits = chain.run((drafting, [1, 2, 3, index]), (alone, [token_id]))[4:]
        assert mx.array_equal(logits, generated_logits[index : index + 1])
