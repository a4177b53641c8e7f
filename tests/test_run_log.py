"""A run's log stays small, and a disk that refuses it stops nothing."""

from pathlib import Path

import pytest

from mlx_k2 import run_log
from mlx_k2.deployment import Watcher
from mlx_k2.run_log import RunLog


def test_the_files_of_a_log_stay_within_twice_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "MAX_FILE_BYTES", 1000)
    log = RunLog(tmp_path, Watcher())
    for number in range(200):
        log.log(f"line {number}")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2 * 1100
    assert (tmp_path / "stages.log").read_text().endswith("line 199\n")


def test_a_folder_that_is_gone_stops_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "logs", Watcher())
    (tmp_path / "logs").rmdir()
    log.log("a line")
    assert log.write_report("a fault") is None
