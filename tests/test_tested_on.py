"""Tests of bench.tested_on: which results of a machine's report are problems, and a report of this machine."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import msgspec
import pytest

from bench import tested_on
from bench.tested_on import ANSWER, PAGE, ProgramResult, Report, problems, read_report, row, with_table
from mlx_k2.kernels.dispatch import Dispatch
from mlx_k2.kernels.report import KernelLine, KernelReport
from mlx_k2.kernels.self_check import DECODE, ROUTER, LayerShape, check_kernel
from mlx_k2.kernels.timing import untimed_line
from mlx_k2.kernels.tuning import DEFAULT
from tests.metal_cpu.test_self_check import perform, perform_uncompilable, perform_wrong

pytestmark = pytest.mark.timeout(120)

SHAPE = LayerShape(hidden_size=64, intermediate_size=32, top_k=4, dtype=mx.bfloat16)
SUCCESS = ProgramResult(0, "", "")


NO_KERNELS = KernelReport(mlx_k2_version="0.1.0", mlx_version="0.32.4", system="macOS 15", chip="Apple M9", kernels=())


def report_of(lines: Sequence[KernelLine]) -> Report:
    """Return the report of a Mac with these kernels, on which all commands succeeded."""
    return Report(
        commit="0123456",
        system="macOS 15",
        python="3.11.7",
        memory_gb=8.0,
        needs_gpu=True,
        kernels_run=SUCCESS,
        kernels=msgspec.structs.replace(NO_KERNELS, kernels=tuple(lines)),
        generate=ProgramResult(0, f"{ANSWER}\n", ""),
        bit_identity=SUCCESS,
    )


def report_of_device(performer: Callable[[Dispatch], list[mx.array]]) -> Report:
    """Return the report of a device on which ``performer`` runs the dispatches of kernels."""
    return report_of([untimed_line(check_kernel(name, SHAPE, DEFAULT, performer)) for name in (DECODE, ROUTER)])


def run_read_command(report: Report, path: Path) -> subprocess.CompletedProcess[str]:
    """Write the report to ``path`` and run `bench.tested_on read` on it."""
    path.write_bytes(msgspec.json.encode(report))
    return subprocess.run(
        [sys.executable, "-m", "bench.tested_on", "read", str(path)], capture_output=True, text=True, timeout=60
    )


@pytest.mark.slow
def test_kernels_that_agree_make_no_problem() -> None:
    report = report_of_device(perform)
    assert problems(report) == []
    assert row(report) == "| Apple M9 | macOS 15 | 8 | 0.32.4, 0123456 | decode, router | none | none |"


def test_a_planted_wrong_kernel_result_makes_the_report_fail(tmp_path: Path) -> None:
    result = run_read_command(report_of_device(perform_wrong), tmp_path / "report.json")
    assert result.returncode == 1
    assert "problem: the decode kernel computes wrong numbers: off by " in result.stdout
    assert "problem: the router kernel computes wrong numbers: off by " in result.stdout


def test_a_kernel_whose_numbers_are_not_finite_makes_the_report_fail(tmp_path: Path) -> None:
    line = KernelLine(kernel=DECODE, usable=False, ran=True, error=float("inf"), reason="off by inf")
    result = run_read_command(report_of([line]), tmp_path / "report.json")
    assert result.returncode == 1
    assert "problem: the decode kernel computes wrong numbers: off by inf" in result.stdout


def test_a_refused_kernel_is_recorded_and_is_no_problem(tmp_path: Path) -> None:
    result = run_read_command(report_of_device(perform_uncompilable), tmp_path / "report.json")
    assert result.returncode == 0, result.stdout
    assert "| none | decode, router | none |" in result.stdout  # usable kernels, refused kernels, problems


def test_a_file_that_is_no_report_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("{}")
    with pytest.raises(SystemExit, match=r"report\.json is not a report that `bench\.tested_on run` wrote: "):
        read_report(path)


GOOD_REPORT = report_of([KernelLine(kernel=DECODE, usable=True, ran=True, error=1e-3, reason="")])
FAILURES: dict[str, tuple[Report, str]] = {
    "a crash": (
        msgspec.structs.replace(
            GOOD_REPORT, kernels=None, kernels_run=ProgramResult(-11, "", "it crashed"), needs_gpu=False
        ),
        "mlx-k2 kernels ended with exit code -11: it crashed",
    ),
    "a hang": (
        msgspec.structs.replace(GOOD_REPORT, generate=ProgramResult(None, "", "")),
        "mlx-k2 generate did not end in 300 s",
    ),
    "another answer": (
        msgspec.structs.replace(GOOD_REPORT, generate=ProgramResult(0, "I know", "")),
        "two stages answered 'I know'",
    ),
    "a failed test": (
        msgspec.structs.replace(GOOD_REPORT, bit_identity=ProgramResult(1, "1 failed", "")),
        "the tests of bit-identity ended with exit code 1: 1 failed",
    ),
    "no report": (msgspec.structs.replace(report_of([]), kernels=None), "mlx-k2 kernels printed no report"),
    "no GPU": (
        msgspec.structs.replace(report_of([]), kernels=msgspec.structs.replace(NO_KERNELS, chip=None)),
        "MLX found no GPU on the machine of this report: run .ci/mac --without-gpu if it has none",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_each_kind_of_failure_is_one_problem(name: str) -> None:
    report, problem = FAILURES[name]
    assert problems(report) == [problem]


def test_a_command_that_hangs_is_killed_and_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tested_on, "TIMEOUT_S", 0.2)
    ended = tested_on._run(["/bin/sh", "-c", "echo started; sleep 60 & wait"], tmp_path)
    assert ended.exit_code is None
    assert ended.stdout == "started\n"  # read to its end: `sleep`, which inherited it, was killed, too


@pytest.mark.slow
def test_the_report_of_this_machine_is_written_and_has_no_problem(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "bench.tested_on", "run", "--out", str(out)]
    if sys.platform != "darwin":
        command.append("--without-gpu")
    result = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stdout + result.stderr
    report = read_report(out)
    assert problems(report) == []
    assert " passed in " in report.bit_identity.stdout
    assert report.generate.stdout.strip() == ANSWER


def test_the_table_in_the_page_equals_the_received_reports() -> None:
    page = PAGE.read_text()
    assert with_table(page) == page, "run python -m bench.tested_on page"
