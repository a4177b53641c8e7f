"""Tests of determinism: in float32 on a CPU a sequence's logits are the same bits for any chunks, batch and stages."""

import mlx.core as mx
import pytest

from mlx_k2.model.batch import Span
from tests.model.chain import Chain
from tests.model.checkpoints import Checkpoint

PROMPT = [(53 * i + 7) % 509 for i in range(100)]
GENERATED = [(29 * i + 3) % 509 for i in range(34)]
OTHER_PROMPT = [(71 * i + 1) % 509 for i in range(90)]


@pytest.fixture(scope="module", params=["thinking", "direct query, groups"])
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def prompt_logits(checkpoint: Checkpoint, variant: str) -> mx.array:
    """Return the prompt's logits, computed in one chunk and one stage, without other sequences."""
    return Chain(checkpoint(variant), 1).prefill(PROMPT)


@pytest.fixture(scope="module")
def generated_logits(checkpoint: Checkpoint, variant: str) -> mx.array:
    """Return the logits of the generated tokens, computed one by one in one stage, without other sequences."""
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
def test_generated_tokens_recomputed_with_a_new_cache_have_identical_logits(
    checkpoint: Checkpoint, variant: str, generated_logits: mx.array, num_stages: int, chunk_tokens: int | None
) -> None:
    chain = Chain(checkpoint(variant), num_stages)
    chain.prefill(PROMPT, chunk_tokens=64)
    recomputed = chain.decode(GENERATED, len(PROMPT), chunk_tokens=chunk_tokens)
    assert mx.array_equal(recomputed, generated_logits)


def test_other_sequences_in_a_batch_do_not_change_the_logits(
    checkpoint: Checkpoint, variant: str, prompt_logits: mx.array, generated_logits: mx.array
) -> None:
    chain = Chain(checkpoint(variant), 2)
    chain.prefill(OTHER_PROMPT, slot=2)
    chunk_logits = []
    half = len(PROMPT) // 2
    for number, token_ids in enumerate((PROMPT[:half], PROMPT[half:])):
        decoding = Span(slot=2, position=len(OTHER_PROMPT) + number, count=1, is_prompt=False)
        chunk = Span(slot=0, position=number * half, count=half, is_prompt=True)
        other_chunk = Span(slot=1, position=number * half, count=half, is_prompt=True)
        logits = chain.run((decoding, [number]), (chunk, token_ids), (other_chunk, token_ids[::-1]))
        chunk_logits.append(logits[1 : 1 + half])
    assert mx.array_equal(mx.concatenate(chunk_logits), prompt_logits)
    for index, token_id in enumerate(GENERATED):
        decoding = Span(slot=0, position=len(PROMPT) + index, count=1, is_prompt=False)
        other_end = len(OTHER_PROMPT) + 2  # slot 2 has decoded two tokens above
        drafting = Span(slot=2, position=other_end + index, count=4, is_prompt=False)
        logits = chain.run((drafting, [1, 2, 3, index]), (decoding, [token_id]))
        assert mx.array_equal(logits[4:], generated_logits[index : index + 1])
