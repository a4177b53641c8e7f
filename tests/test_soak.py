"""Half a minute of the soak; .ci/run adds two minutes of it, and the hour is bench/soak.py's."""

import tempfile
from pathlib import Path

import pytest

from bench.soak import NO_LIMIT, soak


@pytest.mark.timeout(400)
def test_streams_go_on_through_random_faults_and_nothing_is_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "temporary"
    own.mkdir()
    monkeypatch.setenv("TMPDIR", str(own))
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    tally = soak(tmp_path, minutes=0.3, num_restarts=NO_LIMIT, fault_every_s=4.0, seed=1)
    assert tally.restarts and tally.streams
    assert tally.wrong == 0
    assert tally.left.total() == 0, tally.left
