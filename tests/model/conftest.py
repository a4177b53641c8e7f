"""What this folder's tests share: checkpoints, written once, and MLX as the stage program runs it on a CPU."""

from collections.abc import Iterator

import mlx.core as mx
import pytest

from tests.model.chain import Chain
from tests.model.checkpoints import Checkpoint, make_checkpoints


@pytest.fixture(scope="package", autouse=True)
def without_compiling() -> Iterator[None]:
    """MLX's compiler for CPUs calls a C++ compiler; no stage uses it there."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def chain(checkpoint: Checkpoint) -> Chain:
    """The default variant in one stage, with an empty cache."""
    return Chain(checkpoint("thinking"), 1)
