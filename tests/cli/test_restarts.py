"""Tests of a stage that is killed during an answer: with restarts the answer continues and is the same."""

import json
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cli.command import CommandLine, processes_below
from tests.local_cluster import wait_until_gone

ASKED = ("generate", "Hello", "--seed", "1", "--max-tokens", "120", "--stages", "2")


def kill_a_stage(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Kill one stage after the answer has begun. Return all processes below the command, listed before the kill."""
    assert process.stdout
    process.stdout.read(1)
    below = processes_below(process)
    next(stage for stage in below if "mlx_k2.stage.program" in stage.cmdline()).kill()
    return below


@pytest.mark.slow
def test_json_output_continues_after_a_restart_and_reports_the_restart_in_one_line(command_line: CommandLine) -> None:
    alone = [json.loads(line) for line in command_line.run(*ASKED, "--json").stdout.splitlines()]
    process = command_line.start(*ASKED, "--json")
    below = kill_a_stage(process)
    rest, reported = process.communicate(timeout=60)
    assert process.returncode == 0
    lines: list[dict[str, Any]] = [json.loads(line) for line in (b"{" + rest).splitlines()]
    (restart,) = [line["restart"] for line in lines if "restart" in line]
    assert (
        restart["number"] == 1
        and "ended with signal 9: it was killed, possibly by the out-of-memory killer" in restart["reason"]
    )
    assert [line for line in lines if "token" in line] == [line for line in alone if "token" in line]
    assert b"all stages start again in 1 s (1 of at most 3 within 10 minutes of each other)" in reported
    assert wait_until_gone(below, 0) == []


@pytest.mark.slow
def test_with_restarts_off_a_fault_keeps_the_text_prints_one_line_and_writes_a_report(
    command_line: CommandLine, tmp_path: Path
) -> None:
    whole = command_line.run(*ASKED).stdout
    process = command_line.start(*ASKED, "--restarts", "off", "--log-dir", str(tmp_path / "logs"))
    kill_a_stage(process)
    rest, reported = process.communicate(timeout=60)
    assert process.returncode == 1
    assert whole[1:].startswith(rest.decode().rstrip("\n"))
    (line,) = [line for line in reported.decode().splitlines() if line.startswith("error: ")]
    assert "step" in line and ") ended with signal 9: it was killed, possibly by the out-of-memory killer" in line
    (report,) = (tmp_path / "logs").glob("report-*.txt")
    text = report.read_text()
    assert line.removeprefix("error: ") in text
    assert all(
        title in text for title in ("== versions\nmlx-k2 ", "stage 1 on 127.0.0.1: layers", '"step": 0, "stage": ')
    )
    assert "Hello" not in text and "token_ids" not in text
