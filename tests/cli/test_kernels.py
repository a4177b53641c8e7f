"""Tests of `mlx-k2 kernels`: its output with and without a GPU, the saved buffer limits, and the report to send."""

import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from mlx_k2.cli import kernels
from mlx_k2.kernels.report import DecodeTime, KernelLine, KernelReport
from mlx_k2.stage.mlx_settings import MLX_DEFAULTS, BufferLimits
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


needs_no_gpu = pytest.mark.skipif(sys.platform == "darwin", reason="needs no Metal GPU: run on Linux")


@pytest.mark.slow
@needs_no_gpu
def test_without_a_gpu_the_command_reports_that_plain_mlx_runs(command_line: CommandLine) -> None:
    result = command_line.run("kernels")
    assert result.returncode == 0, result.stderr
    assert "this machine has no GPU that MLX can use" in result.stderr
    assert "plain MLX runs in their place" in result.stderr
    assert result.stdout == ""


@pytest.mark.slow
@needs_no_gpu
def test_without_a_gpu_the_report_has_no_chip_and_no_kernel(command_line: CommandLine) -> None:
    result = command_line.run("kernels", "--check")
    report = msgspec.convert(msgspec.json.decode(result.stdout)["report"], KernelReport)
    assert (report.chip, report.kernels, report.plain_mlx_gb_per_s) == (None, (), None)


def test_with_a_gpu_the_best_buffer_limits_are_saved_and_the_report_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = kernels.CANDIDATES[1]
    saved: list[BufferLimits] = []
    logged: list[str] = []

    def measure(measurement: str, _result_type: type[Any], environment: Mapping[str, str] | None = None) -> Any:
        """Return the measurements of a Mac."""
        if measurement == "report":
            return REPORT
        return DecodeTime(0.010 if environment == fastest.environment() else 0.011)

    monkeypatch.setattr(kernels, "_measure", measure)
    monkeypatch.setattr(kernels, "save_limits", saved.append)
    monkeypatch.setattr(kernels, "log", logged.append)
    result = CliRunner().invoke(kernels.command)
    assert result.exit_code == 0, result.output
    assert saved == [fastest]
    document = msgspec.json.decode(result.stdout)
    assert msgspec.convert(document["report"], KernelReport) == REPORT
    assert len(document["seconds_by_limits"]) == len(kernels.CANDIDATES)
    assert "the router kernel is not used: it did not compile" in logged


def test_a_row_shows_the_check_the_error_and_the_percentage_of_a_plain_read() -> None:
    rows: Sequence[tuple[str, ...]] = [kernels._cells(line, 800.0) for line in REPORT.kernels]
    assert rows == [
        ("decode", "used", "2.0e-03", "1", "600", "400", "75%"),
        ("router", "not used", "-", "-", "-", "-", "-"),
    ]


def test_best_limits_keeps_the_default_unless_another_is_more_than_1_percent_faster() -> None:
    default, other = BufferLimits(100, 1_000_000), BufferLimits(200, 200)
    assert kernels.best_limits({default: 1.0, MLX_DEFAULTS: 1.1, other: 0.995}, default) == default
    assert kernels.best_limits({default: 1.0, MLX_DEFAULTS: 1.1, other: 0.9}, default) == other
    assert kernels.best_limits({default: 1.0, MLX_DEFAULTS: 0.9, other: 1.1}, default) == MLX_DEFAULTS


def test_each_candidate_is_measured_in_a_separate_process_with_only_its_limits_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "{\\"seconds\\": ${MLX_MAX_OPS_PER_BUFFER:-1}}"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "7")
    assert kernels._measure("decode", DecodeTime).seconds == 1  # the 7 of this process is not passed on
    assert kernels._measure("decode", DecodeTime, BufferLimits(200, 300).environment()).seconds == 200


def test_the_report_is_one_file_with_every_measurement_and_the_trace_or_why_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Replace the program that measures a Mac's GPU, and Xcode's tools, by shell scripts."""
    measurements = {
        "report": msgspec.json.encode(REPORT).decode(),
        "decode": '{"seconds": 0.01}',
        "idle": '{"held_bytes": 1, "warm_seconds": 0.1, "idle_seconds": 5.${MLX_METAL_RESIDENCY_REFRESH_INTERVAL_MS}}',
        "attention": '{"fused_seconds": 0.2, "unfused_seconds": 0.1}',
    }
    cases = "".join(f"{name}) cat <<END\n{output}\nEND\n;;\n" for name, output in measurements.items())
    python, tools = tmp_path / "python", tmp_path / "bin"
    python.write_text(f"#!/bin/sh\ncase $4 in\n{cases}esac\n")  # $4: the measurement, after -P -m and the module
    python.chmod(0o755)
    tools.mkdir()
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(kernels, "save_limits", lambda _: None)
    monkeypatch.setenv("PATH", str(tools), prepend=":")

    def write_report() -> tuple[dict[str, Any], list[str]]:
        """Return the content of report.json, and the names of all files."""
        result = CliRunner().invoke(kernels.command, ["--report", str(tmp_path / "kernels.zip")])
        assert result.exit_code == 0, result.output
        with zipfile.ZipFile(tmp_path / "kernels.zip") as file:
            return msgspec.json.decode(file.read("report.json")), file.namelist()

    document, names = write_report()
    assert msgspec.convert(document["report"], KernelReport) == REPORT
    assert len(document["seconds_by_limits"]) == len(kernels.CANDIDATES)
    idle_seconds = {ms: idle["idle_seconds"] for ms, idle in document["idle_by_refresh_ms"].items()}
    assert idle_seconds == {"0": 5.0, "500": 5.5}  # the script writes the interval behind "5."
    assert document["attention"] == {"fused_seconds": 0.2, "unfused_seconds": 0.1}
    assert document["trace"].startswith("not recorded: ")
    assert names == ["report.json"]
    (tools / "xcrun").write_text('#!/bin/sh\nmkdir "$6" && echo counters > "$6/data"\n')  # $6: after --output
    (tools / "xcrun").chmod(0o755)
    document, names = write_report()
    assert (document["trace"], names) == ("recorded", ["report.json", "decode.trace/data"])
