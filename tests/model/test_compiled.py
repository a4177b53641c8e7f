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


def prompt_and_decoded(checkpoint: Checkpoint) -> mx.array:
    """Return logits of a prompt, in chunks below and above the size that is compiled, and of generated tokens."""
    chain = Chain(checkpoint("thinking"), 1)
    prompt = chain.prefill(PROMPT, chunk_tokens=30)
    return mx.concatenate([prompt, chain.decode([7, 8, 9, 10], len(PROMPT), chunk_tokens=1)])


@pytest.fixture
def plain(checkpoint: Checkpoint) -> mx.array:
    return prompt_and_decoded(checkpoint)


def test_compiled_layers_equal_uncompiled_layers(checkpoint: Checkpoint, plain: mx.array, compiling: None) -> None:
    assert largest_difference(prompt_and_decoded(checkpoint), plain) < 1e-4
