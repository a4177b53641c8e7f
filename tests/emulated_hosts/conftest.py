"""Fixture of three emulated hosts for one test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.emulated_hosts.hosts import EmulatedHosts, what_is_missing


@pytest.fixture
def emulated_hosts(tmp_path: Path) -> Iterator[EmulatedHosts]:
    """Yield three hosts with nothing running on them. Processes that a test leaves there are ended."""
    if missing := what_is_missing():
        pytest.skip(missing)
    folder = tmp_path / "hosts"
    folder.mkdir()
    with EmulatedHosts(folder, num_hosts=3) as hosts:
        yield hosts
