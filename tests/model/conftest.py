"""Fixtures of this folder's tests: checkpoints, written once, and MLX as the stage program runs it on a CPU."""

from collections.abc import Iterator

import pytest

from tests.model.chain import Chain, like_a_stage_on_a_cpu
from tests.model.checkpoints import Checkpoint, make_checkpoints


@pytest.fixture(scope="package", autouse=True)
def as_a_stage_on_a_cpu() -> Iterator[None]:
    with like_a_stage_on_a_cpu():
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def chain(checkpoint: Checkpoint) -> Chain:
    """Return the variant "thinking" in one stage, with an empty cache."""
    return Chain(checkpoint("thinking"), 1)
