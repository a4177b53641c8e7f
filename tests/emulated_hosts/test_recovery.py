"""Tests of two rows of the fault matrix over real ssh. bench/faults.py runs all rows."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.emulated_hosts.fault_matrix import FAULTS
from tests.emulated_hosts.fault_run import NUM_HOSTS, FaultSetup, undisturbed
from tests.emulated_hosts.faults import Tokens, try_fault
from tests.emulated_hosts.hosts import EmulatedHosts, what_is_missing
from tests.local_cluster import write_model

pytestmark = pytest.mark.slow

FAULTS_BY_NAME = {fault.name: fault for fault in FAULTS}
TIMES_SLOWER = 6.0
"""Factor on the time limits of the fault matrix, because other tests run at the same time."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedHosts]:
    """Yield three hosts for all rows. No row leaves a process or a file on them."""
    if missing := what_is_missing():
        pytest.skip(missing)
    with EmulatedHosts(tmp_path_factory.mktemp("hosts"), NUM_HOSTS) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def expected(hosts: EmulatedHosts, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return undisturbed(hosts, model, tmp_path_factory.mktemp("undisturbed") / "setup")


@pytest.mark.parametrize(
    "name", ["data cable pulled, ssh goes another way", "unknown process connects to a stage's port"]
)
def test_a_fault_has_the_outcome_of_its_row_and_only_stages_of_the_row_are_named(
    hosts: EmulatedHosts, model: Path, expected: Tokens, tmp_path: Path, name: str
) -> None:
    try_fault(FAULTS_BY_NAME[name], FaultSetup(hosts, model, tmp_path / "setup"), expected, TIMES_SLOWER)


def test_every_row_of_the_fault_matrix_has_a_unique_name() -> None:
    assert len(FAULTS_BY_NAME) == len(FAULTS)
