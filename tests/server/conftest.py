"""One server for all tests of this package: the built-in model on two stages."""

from collections.abc import Iterator

import pytest

from tests.server.server_process import Server, home_of, serving


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the built-in model on two stages, used by many tests."""
    with serving(home_of(tmp_path_factory.mktemp("home")), "--max-sequences", "4") as found:
        yield found
