"""Test of the soak up to its third restart. .ci/run also runs the soak for two minutes, and `make long` for an hour."""

import tempfile
from pathlib import Path

import pytest

from bench.soak import soak

NUM_RESTARTS = 3


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_streams_continue_through_random_faults_and_no_resource_is_leaked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary_folder = tmp_path / "temporary"  # the soak counts the files that are left in it
    temporary_folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary_folder))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary_folder))
    usage = soak(tmp_path, minutes=5, num_restarts=NUM_RESTARTS, fault_every_s=4.0, seed=1)
    assert len(usage.restarts) >= NUM_RESTARTS and usage.streams
    assert usage.wrong == 0
    assert usage.leaked.total() == 0, usage.leaked
