"""Tests of the run log and of fault reports: their sizes and numbers are bounded, and a failing disk stops no run."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mlx_k2.deployment import run_log
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.deployment.run_log import RunLog


@dataclass
class RecordingListener(DeploymentListener):
    """Listener that collects the notifications."""

    notifications: list[str] = field(default_factory=list)

    def notify(self, line: str) -> None:
        self.notifications.append(line)


def test_the_log_files_together_stay_below_twice_the_file_limit_and_the_last_line_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "MAX_FILE_BYTES", 1000)
    log = RunLog(tmp_path, DeploymentListener())
    for number in range(200):
        log.log(f"line {number}")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2 * 1100  # a line has less than 100 bytes
    assert (tmp_path / "stages.log").read_text().endswith("line 199\n")


def test_a_missing_log_folder_is_notified_once_and_raises_nothing(tmp_path: Path) -> None:
    listener = RecordingListener()
    log = RunLog(tmp_path / "logs", listener)
    (tmp_path / "logs").rmdir()
    log.log("a line")
    log.log("another line")
    assert log.write_report("a fault", ()) is None
    assert [line.partition(": ")[0] for line in listener.notifications] == [
        "the log cannot be written",
        "no report could be written",
    ]


def test_a_report_has_the_tail_of_each_stages_log_and_is_never_overwritten(tmp_path: Path) -> None:
    log = RunLog(tmp_path, DeploymentListener())
    num_dropped = 50
    for rank, num_lines in ((0, 3), (1, run_log.MAX_LINES + num_dropped)):
        for number in range(num_lines):
            log.log(f"[stage {rank} mac-{rank}] line {number}")
    reports = [log.write_report(reason, ["stage 0 on mac-0 (loading for 2 s)"]) for reason in ("a fault", "another")]
    first, second = (report.read_text() for report in reports if report)
    assert "a fault" in first and "another" in second
    assert "== status of the stages at the fault\nstage 0 on mac-0" in first
    assert "[stage 0 mac-0] line 0\n" in first
    assert f"[stage 1 mac-1] line {num_dropped - 1}\n" not in first
    assert f"[stage 1 mac-1] line {num_dropped}\n" in first


def test_the_last_20_reports_of_a_run_and_all_of_another_run_are_kept(tmp_path: Path) -> None:
    log = RunLog(tmp_path, DeploymentListener())
    report_of_another_run = tmp_path / "report-of-another-run.txt"
    report_of_another_run.touch()
    reports = [log.write_report(f"fault {number}", ()) for number in range(25)]
    assert set(tmp_path.glob("report-*")) == {report_of_another_run, *reports[-20:]}
