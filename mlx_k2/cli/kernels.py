"""`mlx-k2 kernels`: checks and times of the kernels on this machine's GPU, and the best settings for it."""

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
from mlx_k2.stage.mlx_settings import MLX_DEFAULTS, BufferLimits, chip_name, default_limits, save_limits

MEASURING_S = 900.0
CANDIDATES = (
    MLX_DEFAULTS,
    *(BufferLimits(*pair) for pair in ((50, 1_000_000), (100, 1_000_000), (200, 1_000_000), (1000, 4000))),
)
"""The limits to time. Few operations and no rule by megabytes: long buffers keep a prompt's temporaries in memory."""
WORTH = 0.99
"""A time must be below this fraction of the time with the default limits; otherwise the difference counts as noise."""

_REFRESH = "MLX_METAL_RESIDENCY_REFRESH_INTERVAL_MS"

Measurement = TypeVar("Measurement", KernelReport, DecodeTime, IdleTime, AttentionTime)


@click.command(cls=ProgramCommand)
@click.option("--check", "checks_only", is_flag=True, help="Check the kernels, time nothing, print the JSON.")
@click.option(
    "--report",
    "report_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Measure also reads of memory after a pause, a prompt's attention and GPU counters; write one ZIP file for "
    "the maintainers.",
)
def command(checks_only: bool, report_file: Path | None) -> None:
    """Check and time the kernels for Kimi K2's layers on this machine's GPU.

    Each kernel's result is compared with plain MLX in float32, its time with plain MLX's and with a plain read of the
    same weights.
    The best sizes, and the best limits for MLX's command buffers, are remembered: every stage that starts on this
    machine uses them. Takes a few minutes and up to 30 GB of memory.

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
    log(f"remembered for this machine's stages: {_named(best)}")
    sent: dict[str, object] = {
        "report": report,
        "seconds_by_limits": {_named(limits): seconds for limits, seconds in times.items()},
    }
    if report_file is None:
        log("please send back what follows, with the Mac's model and memory: it fills the table for this chip")
        write_json_line(sent)
        return
    write_report(report_file, sent)
    log(f"please send back {report_file}, with the Mac's model and memory: it fills the table for this chip")


def write_report(path: Path, sent: dict[str, object]) -> None:
    """Write a ZIP file with report.json, and with a trace of the GPU's counters if Xcode's tools are installed.

    It also has the memory after 5 s without GPU work, with and without MLX's refreshing thread, and the time of the
    attention of a chunk, fused and unfused.
    """
    log("reading GPU memory after 5 s without work, with and without refreshing; timing a prompt's attention ...")
    idle = {value: _measure("idle", IdleTime, environment={_REFRESH: value}) for value in ("0", "500")}
    sent |= {"idle_by_refresh_ms": idle, "attention": _measure("attention", AttentionTime)}
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        sent["trace"] = _record_counters(Path(folder) / "decode.trace")
        file.writestr("report.json", json_line(sent))
        for part in sorted(Path(folder).rglob("*")):
            if part.is_file():
                file.write(part, part.relative_to(folder))


def _record_counters(trace: Path) -> str:
    """Record the GPU's counters while a token's experts are computed. Return "recorded", or why it is not possible."""
    recorder = ["xcrun", "xctrace", "record", "--template", "Metal System Trace", "--output", str(trace), "--launch"]
    program = ["--", sys.executable, "-P", "-m", "mlx_k2.stage.measure_kernels", "decode"]
    try:
        subprocess.run(
            [*recorder, *program],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=MEASURING_S,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        return f"not recorded: {error.stderr.strip()[-200:] or error}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not recorded: {error}"
    return "recorded"


def show_report(report: KernelReport) -> None:
    """Show the table of kernels, and the reason why a kernel is not used."""
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
    """Return the fastest limits; the default ones unless others are faster by more than noise."""
    fastest = min(seconds, key=lambda limits: seconds[limits])
    return fastest if seconds[fastest] < WORTH * seconds[default] else default


def _time_limits() -> dict[BufferLimits, float]:
    """Return the seconds for a token's feed-forward blocks under each limit, each measured in a fresh process."""
    times: dict[BufferLimits, float] = {}
    for limits in CANDIDATES:
        times[limits] = _measure("decode", DecodeTime, limits.environment()).seconds
        log(f"{_named(limits)}: {1000 * times[limits]:.2f} ms for the experts of one token")
    return times


def _named(limits: BufferLimits) -> str:
    if limits == MLX_DEFAULTS:
        return "MLX's own limits"
    return f"{limits.operations} operations or {limits.megabytes} MB in a command buffer"


def _measure(what: str, wanted: type[Measurement], environment: Mapping[str, str] | None = None) -> Measurement:
    """Measure in a separate process, so that its environment and memory end with it. MLX's settings are its own.

    Raises:
        StageStartError: the process failed, or took longer than ``MEASURING_S``.
    """
    kept = {name: value for name, value in os.environ.items() if name not in CANDIDATES[1].environment()}
    program = [sys.executable, "-P", "-m", "mlx_k2.stage.measure_kernels", what]
    try:
        ran = subprocess.run(
            program, stdout=subprocess.PIPE, env=kept | dict(environment or {}), timeout=MEASURING_S, check=True
        )
        return read_json(ran.stdout.splitlines()[-1], wanted)
    except subprocess.TimeoutExpired:
        raise StageStartError(f"measuring took longer than {MEASURING_S:.0f} s: is the GPU busy?") from None
    except subprocess.CalledProcessError as error:
        raise StageStartError(f"measuring ended with exit code {error.returncode}; its output is above") from None
