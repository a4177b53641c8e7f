"""One user for all tests of this folder, and a model that never stops of itself."""

from pathlib import Path

import pytest

from tests.cli.command import CommandLine
from tests.local_cluster import write_model


@pytest.fixture(scope="session")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    return CommandLine(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose config names no stop token, for answers that go on."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny")
