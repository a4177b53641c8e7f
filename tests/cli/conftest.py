"""Fixtures of this folder: a runner of `mlx-k2` with one home folder, and a model without a stop token."""

from pathlib import Path

import pytest

from tests.cli.command import CommandLine
from tests.local_cluster import write_model


@pytest.fixture(scope="session")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    return CommandLine(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model without a stop token, so that its answers run to the token limit."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny")
