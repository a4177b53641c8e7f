"""Tests of `mlx-k2 kernels`: output with and without a GPU, saved buffer limits, and the report that users send."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from mlx_k2.cli import kernels
from mlx_k2.kernels.report import DecodeTime, KernelLine, KernelReport
from mlx_k2.stage.buffer_limits import BufferLimits
from tests.cli.command import CommandLine

pytestmark = pytest.mark.timeout(120)

REPORT = KernelReport(
    mlx_k2_version="0.1.0",
    mlx_version="0.32.4",
    system="macOS 26.1",
    chip="Apple M9 Ultra",
    read_gb_per_s=800.0,
    plain_mlx_gb_per_s=400.0,
    kernels=(
        KernelLine(
            kernel="decode",
            usable=True,
            ran=True,
            error=2e-3,
            reason="",
            tokens=1,
            gb_per_s=600.0,
            plain_mlx_gb_per_s=400.0,
        ),
        KernelLine(kernel="router", usable=False, ran=False, error=None, reason="it did not compile"),
    ),
    sizes={"gate_up_rows": 8},
)


@pytest.mark.skipif(sys.platform == "darwin", reason="needs no Metal GPU: run on Linux")
def test_without_a_gpu_the_command_reports_that_plain_mlx_runs(command_line: CommandLine) -> None:
    ran = command_line.run("kernels")
    assert ran.returncode == 0, ran.stderr
    assert "this machine has no GPU that MLX can use" in ran.stderr
    assert "plain MLX runs in their place" in ran.stderr
    assert ran.stdout == ""


@pytest.mark.skipif(sys.platform == "darwin", reason="needs no Metal GPU: run on Linux")
def test_without_a_gpu_the_report_has_no_chip_and_no_kernel(command_line: CommandLine) -> None:
    ran = command_line.run("kernels", "--report")
    report = msgspec.convert(msgspec.json.decode(ran.stdout)["report"], KernelReport)
    assert (report.chip, report.kernels, report.plain_mlx_gb_per_s) == (None, (), None)


def test_with_a_gpu_the_best_buffer_limits_are_saved_and_the_report_is_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = kernels.CANDIDATES[1]
    kept: list[BufferLimits | None] = []

    def measure(what: str, _wanted: type[Any], limits: BufferLimits | None = None) -> Any:
        if what == "report":
            return REPORT
        return DecodeTime(0.010 if limits == chosen else 0.011)

    shown: list[str] = []
    monkeypatch.setattr(kernels, "_measure", measure)
    monkeypatch.setattr(kernels, "save_limits", kept.append)
    monkeypatch.setattr(kernels, "log", shown.append)
    ran = CliRunner().invoke(kernels.command)
    assert ran.exit_code == 0, ran.output
    assert kept == [chosen]
    sent = msgspec.json.decode(ran.stdout)
    assert msgspec.convert(sent["report"], KernelReport) == REPORT
    assert len(sent["seconds_by_limits"]) == 1 + len(kernels.CANDIDATES)
    assert "the router kernel is not used: it did not compile" in shown


def test_a_row_shows_the_check_the_error_and_the_percentage_of_a_plain_read() -> None:
    rows: Sequence[tuple[str, ...]] = [kernels._cells(line, 800.0) for line in REPORT.kernels]
    assert rows == [
        ("decode", "used", "2.0e-03", "1", "600", "400", "75%"),
        ("router", "not used", "-", "-", "-", "-", "-"),
    ]


def test_best_limits_keeps_the_default_unless_another_is_clearly_faster() -> None:
    slower, faster = BufferLimits(100, 100), BufferLimits(200, 200)
    assert kernels.best_limits({None: 1.0, slower: 1.1, faster: 0.995}) is None
    assert kernels.best_limits({None: 1.0, slower: 1.1, faster: 0.9}) == faster


def test_each_candidate_is_measured_in_a_fresh_process_with_its_limits_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "{\\"seconds\\": ${MLX_MAX_OPS_PER_BUFFER:-1}}"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "7")
    assert kernels._measure("decode", DecodeTime).seconds == 1
    assert kernels._measure("decode", DecodeTime, BufferLimits(200, 300)).seconds == 200
