"""Test that compiled layers, as on a GPU, compute the same as uncompiled layers."""

import shutil
from collections.abc import Iterator

import mlx.core as mx
import pytest

from tests.model.chain import Chain, largest_difference
from tests.model.checkpoints import Checkpoint

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++: apt-get install g++")

PROMPT = [(23 * i + 4) % 509 for i in range(40)]


@pytest.fixture
def compiling() -> Iterator[None]:
    mx.enable_compile()
    yield
    mx.disable_compile()


def logits_of_prompt_and_generated(checkpoint: Checkpoint) -> mx.array:
    """Return logits of a prompt, in chunks of 30 (not compiled) and 10 (compiled) tokens, and of generated tokens."""
    chain = Chain(checkpoint("thinking"), 1)
    prompt_logits = chain.prefill(PROMPT, chunk_tokens=30)
    return mx.concatenate([prompt_logits, chain.decode([7, 8, 9, 10], len(PROMPT), chunk_tokens=1)])


@pytest.fixture
def uncompiled(checkpoint: Checkpoint) -> mx.array:
    return logits_of_prompt_and_generated(checkpoint)


# ``uncompiled`` comes before ``compiling``, because fixtures are set up in the order of the parameters.
def test_compiled_layers_equal_uncompiled_layers(checkpoint: Checkpoint, uncompiled: mx.array, compiling: None) -> None:
    assert largest_difference(logits_of_prompt_and_generated(checkpoint), uncompiled) < 1e-4
