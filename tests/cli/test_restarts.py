"""Tests of a stage that is killed during an answer, with restarts and without."""

import json
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cli.command import CommandLine, descendants_of, stage_processes
from tests.local_cluster import still_running_after

COMMAND = ("generate", "Hello", "--seed", "1", "--max-tokens", "120", "--stages", "2")


def kill_a_stage(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Kill stage 0 after the first byte of the answer. Return all processes that the command had started before."""
    assert process.stdout
    process.stdout.read(1)
    descendants = descendants_of(process)
    stage_processes(descendants)[0].kill()
    return descendants


@pytest.mark.slow
def test_json_output_continues_after_a_restart_and_reports_the_restart_in_one_line(command_line: CommandLine) -> None:
    undisturbed = [json.loads(line) for line in command_line.run(*COMMAND, "--json").stdout.splitlines()]
    process = command_line.start(*COMMAND, "--json")
    descendants = kill_a_stage(process)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    # kill_a_stage has read the first byte.
    lines: list[dict[str, Any]] = [json.loads(line) for line in (b"{" + rest).splitlines()]
    (restart,) = [line["restart"] for line in lines if "restart" in line]
    assert restart["number"] == 1
    assert "ended with signal 9: it was killed, possibly by the out-of-memory killer" in restart["reason"]
    assert [line for line in lines if "token" in line] == [line for line in undisturbed if "token" in line]
    assert b"all stages start again in 1 s (restart 1 of at most 3)" in errors
    assert still_running_after(descendants, 0) == []


@pytest.mark.slow
def test_with_restarts_off_a_fault_keeps_the_text_prints_one_line_and_writes_a_report(
    command_line: CommandLine, tmp_path: Path
) -> None:
    undisturbed = command_line.run(*COMMAND).stdout
    process = command_line.start(*COMMAND, "--restarts", "off", "--log-dir", str(tmp_path / "logs"))
    kill_a_stage(process)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert undisturbed[1:].startswith(rest.decode().rstrip("\n"))  # kill_a_stage has read the first byte
    (error,) = [line for line in errors.decode().splitlines() if line.startswith("error: ")]
    assert "step" in error and ") ended with signal 9: it was killed, possibly by the out-of-memory killer" in error
    (path,) = (tmp_path / "logs").glob("report-*.txt")
    report = path.read_text()
    assert error.removeprefix("error: ") in report
    for part in ("== versions\nmlx-k2 ", "stage 1 on 127.0.0.1: layers", '"step": 0, "stage": '):
        assert part in report
    assert "Hello" not in report and "token_ids" not in report
