"""Reports of machines, which docs/tested-on.md lists: kernels at K2's shape, an answer from two stages, bit-identity.

python -m bench.tested_on run --out FILE       tests this machine and writes its report; exit code 1 if it has a problem
python -m bench.tested_on read FILE            prints a report's row and its problems; exit code 1 if it has a problem
python -m bench.tested_on page                 writes the table of docs/tested-on.md from bench/results/tested_on/*.json
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

from bench.measure import RESULTS, ROOT, commit, replace_generated
from mlx_k2.kernels.report import KernelReport
from mlx_k2.kernels.self_check import TOLERANCE

REPORTS = RESULTS / "tested_on"
PAGE = ROOT / "docs" / "tested-on.md"
MADE_BY = "python -m bench.tested_on page"
QUESTION = "What is mlx-k2?"
ANSWER = "mlx-k2 runs Kimi K2 models over several Macs: each Mac holds some of the layers."
TIMEOUT_S = 300.0
MAX_ERROR = max(TOLERANCE.values())
"""Largest allowed relative error of a kernel: that of bfloat16, in which the checks at K2's shape run."""


class ProgramResult(msgspec.Struct, frozen=True):
    """Result of a program. ``exit_code`` is None if the program did not end within TIMEOUT_S."""

    exit_code: int | None
    stdout: str
    stderr: str

    def problems(self, name: str) -> list[str]:
        """Return one line about the program ``name`` if it hung, crashed or failed; no line if it succeeded."""
        if self.exit_code == 0:
            return []
        ending = f"ended with exit code {self.exit_code}"
        if self.exit_code is None:
            ending = f"did not end in {TIMEOUT_S:.0f} s"
        last_lines = (self.stderr.strip() or self.stdout.strip()).splitlines()[-1:]
        return [": ".join([f"{name} {ending}", *last_lines])]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Results of `mlx-k2 kernels --check`, of `mlx-k2 generate` and of the tests of bit-identity on one machine."""

    commit: str
    system: str
    python: str
    memory_gb: float
    needs_gpu: bool
    """Whether it is a problem if MLX finds no GPU."""
    kernels_run: ProgramResult
    kernels: KernelReport | None
    """None if `mlx-k2 kernels --check` printed no report."""
    generate: ProgramResult
    bit_identity: ProgramResult


class _KernelsOutput(msgspec.Struct, frozen=True):
    report: KernelReport


def problems(report: Report) -> list[str]:
    """Return one line for each crash, hang, wrong number and wrong answer. A refused kernel is no problem."""
    lines = [
        *report.kernels_run.problems("mlx-k2 kernels"),
        *report.generate.problems("mlx-k2 generate"),
        *report.bit_identity.problems("the tests of bit-identity"),
    ]
    lines += [
        f"the {kernel.kernel} kernel computes wrong numbers: {kernel.reason or kernel.error}"
        for kernel in (report.kernels.kernels if report.kernels else ())
        if kernel.ran
        and (kernel.error is None or not kernel.error <= MAX_ERROR)  # None: JSON has null for NaN and infinity
    ]
    if report.generate.exit_code == 0 and report.generate.stdout.strip() != ANSWER:
        lines.append(f"two stages answered {report.generate.stdout.strip()!r}")
    if report.kernels is None and report.kernels_run.exit_code == 0:
        lines.append("mlx-k2 kernels printed no report")
    if report.needs_gpu and report.kernels and report.kernels.chip is None:
        lines.append("MLX found no GPU on the machine of this report: run .ci/mac --without-gpu if it has none")
    return lines


def make_report(*, needs_gpu: bool) -> Report:
    """Run the installed mlx-k2 outside the source tree, then the tests of bit-identity in the source tree."""
    mlx_k2 = str(Path(sys.executable).with_name("mlx-k2"))
    with tempfile.TemporaryDirectory() as folder:
        kernels_run = _run([mlx_k2, "kernels", "--check"], Path(folder))
        generate = _run([mlx_k2, "generate", "--stages", "2", QUESTION], Path(folder))
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/model/test_determinism.py"]
    return Report(
        commit=commit(),
        system=platform.platform(terse=True),
        python=platform.python_version(),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        needs_gpu=needs_gpu,
        kernels_run=kernels_run,
        kernels=_kernel_report(kernels_run.stdout),
        generate=generate,
        bit_identity=_run(tests, ROOT),
    )


def _run(command: Sequence[str], folder: Path) -> ProgramResult:
    """Run a command to its end. After TIMEOUT_S kill its process group."""
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return ProgramResult(None, *process.communicate())
        return ProgramResult(process.returncode, stdout, stderr)


def _kernel_report(stdout: str) -> KernelReport | None:
    try:
        return msgspec.json.decode(stdout, type=_KernelsOutput).report
    except msgspec.DecodeError:
        return None


def read_report(path: Path) -> Report:
    """Read a report that `run` wrote. Exit with a message if it is no such report."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except msgspec.DecodeError as error:
        sys.exit(f"{path} is not a report that `bench.tested_on run` wrote: {error}")


def row(report: Report) -> str:
    """Return the report's row of the table in docs/tested-on.md."""
    kernels = report.kernels
    checks = kernels.kernels if kernels else ()
    used = ", ".join(check.kernel for check in checks if check.usable) or "none"
    refused = ", ".join(check.kernel for check in checks if not check.ran) or "none"
    chip = (kernels.chip if kernels else None) or "no GPU"
    mlx = kernels.mlx_version if kernels else "-"
    cells = (chip, report.system, f"{report.memory_gb:.0f}", f"{mlx}, {report.commit}", used, refused)
    return f"| {' | '.join(cells)} | {'; '.join(problems(report)) or 'none'} |"


def table() -> str:
    """Return the table of all received reports, or a line if there is none."""
    reports = [read_report(path) for path in sorted(REPORTS.glob("*.json"))]
    if not reports:
        return "No report was received yet."
    header = "| chip | system | GB | mlx, commit | kernels used | refused by the device | problems |"
    return "\n".join([header, "|---" * 7 + "|", *map(row, reports)])


def with_table(page: str) -> str:
    """Return the text of docs/tested-on.md with its table generated again."""
    return replace_generated(page, MADE_BY, table())


def main() -> int:
    """Run a subcommand; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--out", type=Path, required=True, metavar="FILE", help="the report to write")
    run.add_argument("--without-gpu", action="store_true", help="this machine has no GPU that MLX can use")
    commands.add_parser("read").add_argument("report", type=Path)
    commands.add_parser("page")
    options = parser.parse_args()
    if options.command == "page":
        PAGE.write_text(with_table(PAGE.read_text()))
        return 0
    if options.command == "run":
        report = make_report(needs_gpu=not options.without_gpu)
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    else:
        report = read_report(options.report)
    print(row(report))
    lines = problems(report)
    for line in lines:
        print(f"problem: {line}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
