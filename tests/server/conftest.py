"""Servers that many tests of this package use."""

from collections.abc import Iterator

import pytest

from tests.cli.command import CommandLine
from tests.server.in_process import SteppedServer, stepped_server
from tests.server.server_process import Server, running_server


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server process with the built-in model on two stages."""
    with running_server(CommandLine(tmp_path_factory.mktemp("home")), "--max-sequences", "4") as running:
        yield running


@pytest.fixture(scope="module")
def fast_server() -> Iterator[SteppedServer]:
    """A server in this process that answers at once, with tokens that have no meaning."""
    with stepped_server(num_slots=4, chunk_tokens=512) as running, running.running_stages():
        yield running
