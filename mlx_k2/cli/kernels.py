"""`mlx-k2 kernels`: checks and times of the kernels on this machine's GPU, and the best settings for this GPU."""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import click

from mlx_k2.cli.console import log, show_table
from mlx_k2.cli.program_command import ProgramCommand
from mlx_k2.cli.streams import write_json_line
from mlx_k2.cli.terminal_text import json_line
from mlx_k2.errors import StageStartError
from mlx_k2.json_text.read import read_json
from mlx_k2.kernels.report import AttentionTime, DecodeTime, IdleTime, KernelLine, KernelReport
from mlx_k2.stage.mlx_settings import LONG_BUFFERS, MLX_DEFAULTS, BufferLimits, chip_name, default_limits, save_limits

MEASUREMENT_TIMEOUT_S = 900.0
_NO_MEGABYTE_LIMIT = 1_000_000
CANDIDATES = (
    MLX_DEFAULTS,
    BufferLimits(operations=50, megabytes=_NO_MEGABYTE_LIMIT),
    LONG_BUFFERS,
    BufferLimits(operations=200, megabytes=_NO_MEGABYTE_LIMIT),
    BufferLimits(operations=1000, megabytes=4000),
)
"""The limits to time, among them the default of every chip.

Most allow few operations, because long command buffers keep a prompt's temporaries in memory.
"""
MAX_TIME_FRACTION = 0.99
"""Limits replace the default ones if their time is below this fraction of the default time; less may be noise."""

_REFRESH_VARIABLE = "MLX_METAL_RESIDENCY_REFRESH_INTERVAL_MS"
_REFRESH_INTERVALS_MS = ("0", "500")  # without MLX's thread that keeps memory resident, and with it as in stages

Measurement = TypeVar("Measurement", KernelReport, DecodeTime, IdleTime, AttentionTime)


@click.command(cls=ProgramCommand)
@click.option("--check", "checks_only", is_flag=True, help="Only check the kernels, and print the results as JSON.")
@click.option(
    "--report",
    "report_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also measure memory reads after a pause, a prompt's attention and GPU counters, and write a ZIP file for the "
    "maintainers.",
)
def command(checks_only: bool, report_file: Path | None) -> None:
    """Check and time the kernels for Kimi K2's layers on this machine's GPU.

    Each kernel's result is compared with plain MLX in float32, its time with plain MLX's and with a plain read of the
    same weights. The best kernel sizes, and the best limits of MLX's command buffers, are stored: every stage that
    starts on this machine uses them. Takes a few minutes and up to 30 GB of memory.

    \b
    The table goes to stderr. To send a report to the maintainers, also when all checks pass:
        mlx-k2 kernels --report kernels.zip
    """  # noqa: D301  # click reads the escape
    if checks_only:
        write_json_line({"report": _measure("check", KernelReport)})
        return
    log("checking and timing kernels ...")
    report = _measure("report", KernelReport)
    if report.chip is None:
        assert report.plain_mlx_gb_per_s is not None
        log(f"this machine has no GPU that MLX can use ({report.system}, mlx {report.mlx_version}): no kernel runs")
        log(f"plain MLX runs in their place: one token's experts at {report.plain_mlx_gb_per_s:.2f} GB/s")
        return
    show_report(report)
    times = _time_limits()
    best = best_limits(times, default_limits(chip_name()))
    save_limits(best)
    log(f"stored for this machine's stages: {_limits_text(best)}")
    results: dict[str, object] = {
        "report": report,
        "seconds_by_limits": {_limits_text(limits): seconds for limits, seconds in times.items()},
    }
    if report_file is None:
        log("please send the next line to the maintainers, with the Mac's model and memory")
        write_json_line(results)
        return
    write_report(report_file, results)
    log(f"please send {report_file} to the maintainers, with the Mac's model and memory")


def write_report(path: Path, results: dict[str, object]) -> None:
    """Write a ZIP file with report.json, and with a trace of the GPU's counters if Xcode's tools are installed.

    report.json has ``results``, the speed of memory reads after 5 s without GPU work, with and without MLX's thread
    that keeps memory resident, and the time of the attention of a chunk, fused and unfused.
    """
    log("reading GPU memory after 5 s without work, with and without refreshing; timing a prompt's attention ...")
    idle_times = {
        interval_ms: _measure("idle", IdleTime, environment={_REFRESH_VARIABLE: interval_ms})
        for interval_ms in _REFRESH_INTERVALS_MS
    }
    results |= {"idle_by_refresh_ms": idle_times, "attention": _measure("attention", AttentionTime)}
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        results["trace"] = _record_counters(Path(folder) / "decode.trace")
        archive.writestr("report.json", json_line(results))
        for trace_file in sorted(Path(folder).rglob("*")):
            if trace_file.is_file():
                archive.write(trace_file, trace_file.relative_to(folder))


def _record_counters(trace: Path) -> str:
    """Record the GPU's counters while a token's experts are computed; return "recorded", or "not recorded: REASON"."""
    recorder = ["xcrun", "xctrace", "record", "--template", "Metal System Trace", "--output", str(trace), "--launch"]
    program = ["--", *_measure_command("decode")]
    try:
        subprocess.run(
            [*recorder, *program],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=MEASUREMENT_TIMEOUT_S,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        return f"not recorded: {error.stderr.strip()[-200:] or error}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not recorded: {error}"
    return "recorded"


def show_report(report: KernelReport) -> None:
    """Show the table of kernels, the reason why a kernel is not used, the speed of a plain read and the best sizes."""
    log(f"{report.chip}, {report.system}, mlx {report.mlx_version}, mlx-k2 {report.mlx_k2_version}")
    headings = ("kernel", "check", "largest error", "tokens", "GB/s", "plain MLX", "of a plain read")
    show_table(headings, [_cells(line, report.read_gb_per_s) for line in report.kernels], left=["kernel", "check"])
    for line in report.kernels:
        if not line.usable:
            log(f"the {line.kernel} kernel is not used: {line.reason}")
    if report.read_gb_per_s is not None:
        log(f"a plain read of the same weights: {report.read_gb_per_s:.0f} GB/s")
    if report.sizes:
        log("best sizes: " + ", ".join(f"{name} {size}" for name, size in report.sizes.items()))


def _cells(line: KernelLine, read_gb_per_s: float | None) -> tuple[str, ...]:
    fraction = line.gb_per_s / read_gb_per_s if line.gb_per_s and read_gb_per_s else None
    return (
        line.kernel,
        "used" if line.usable else "not used",
        "-" if line.error is None else f"{line.error:.1e}",
        "-" if line.tokens is None else str(line.tokens),
        "-" if line.gb_per_s is None else f"{line.gb_per_s:.0f}",
        "-" if line.plain_mlx_gb_per_s is None else f"{line.plain_mlx_gb_per_s:.0f}",
        "-" if fraction is None else f"{100 * fraction:.0f}%",
    )


def best_limits(seconds: Mapping[BufferLimits, float], default: BufferLimits) -> BufferLimits:
    """Return the limits with the least of ``seconds``; ``default``, one of them, if its time is hardly longer."""
    fastest = min(seconds, key=lambda limits: seconds[limits])
    return fastest if seconds[fastest] < MAX_TIME_FRACTION * seconds[default] else default


def _time_limits() -> dict[BufferLimits, float]:
    """Return the seconds for one token's experts with each of CANDIDATES, each measured in a separate process."""
    times: dict[BufferLimits, float] = {}
    for limits in CANDIDATES:
        times[limits] = _measure("decode", DecodeTime, limits.environment()).seconds
        log(f"{_limits_text(limits)}: {1000 * times[limits]:.2f} ms for the experts of one token")
    return times


def _limits_text(limits: BufferLimits) -> str:
    if limits == MLX_DEFAULTS:
        return "MLX's own limits"
    return f"{limits.operations} operations or {limits.megabytes} MB in a command buffer"


def _measure_command(measurement: str) -> list[str]:
    return [sys.executable, "-P", "-m", "mlx_k2.stage.measure_kernels", measurement]


def _measure(
    measurement: str, result_type: type[Measurement], environment: Mapping[str, str] | None = None
) -> Measurement:
    """Run a measurement in a separate process, which frees its memory at its end, and return the result.

    Of the limits of MLX's command buffers, only those in ``environment`` are set.

    Raises:
        StageStartError: the process failed, or took longer than ``MEASUREMENT_TIMEOUT_S``.
    """
    limit_variables = LONG_BUFFERS.environment().keys()  # any limits: all but MLX's own set the same variables
    other_variables = {name: value for name, value in os.environ.items() if name not in limit_variables}
    try:
        process = subprocess.run(
            _measure_command(measurement),
            stdout=subprocess.PIPE,
            env=other_variables | dict(environment or {}),
            timeout=MEASUREMENT_TIMEOUT_S,
            check=True,
        )
        return read_json(process.stdout.splitlines()[-1], result_type)
    except subprocess.TimeoutExpired:
        raise StageStartError(f"measuring took longer than {MEASUREMENT_TIMEOUT_S:.0f} s: is the GPU busy?") from None
    except subprocess.CalledProcessError as error:
        raise StageStartError(f"measuring ended with exit code {error.returncode}; its output is above") from None
