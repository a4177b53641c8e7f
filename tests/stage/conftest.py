"""Fixtures of this folder: random checkpoints, and MLX set up as in a stage on a CPU."""

from collections.abc import Iterator

import pytest

from tests.model.chain import like_a_stage_on_a_cpu
from tests.model.checkpoints import Checkpoint, make_checkpoints


@pytest.fixture(scope="module")
def as_a_stage_on_a_cpu() -> Iterator[None]:
    """Set up MLX as the stage program does on a CPU."""
    with like_a_stage_on_a_cpu():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return the function that writes a variant of the tiny checkpoint and returns its folder."""
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))
