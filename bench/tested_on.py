"""Reports of machines: kernels at K2's shape, an answer from two stages, bit-identity. They make docs/tested-on.md.

python -m bench.tested_on run --out FILE       tests this machine and writes its report; exit code 1 if it has a problem
python -m bench.tested_on read FILE            prints a report's row and its problems; exit code 1 if it has one
python -m bench.tested_on page                 writes the table in docs/tested-on.md from bench/results/tested_on/*.json
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

from bench.measure import RESULTS, ROOT, commit, with_part
from mlx_k2.kernels.report import KernelReport
from mlx_k2.kernels.self_check import TOLERANCE

REPORTS = RESULTS / "tested_on"
PAGE = ROOT / "docs" / "tested-on.md"
MADE_BY = "python -m bench.tested_on page"
QUESTION = "What is mlx-k2?"
ANSWER = "mlx-k2 runs Kimi K2 models over several Macs: each Mac holds some of the layers."
TIMEOUT_S = 300.0
ALLOWED_ERROR = max(TOLERANCE.values())
"""Largest allowed error of a kernel in bfloat16, the dtype of the checks at K2's shape."""


class Ended(msgspec.Struct, frozen=True):
    """The result of a program. ``exit_code`` is None if it did not end within TIMEOUT_S."""

    exit_code: int | None
    stdout: str
    stderr: str

    def problem(self, name: str) -> list[str]:
        """Return one line if the program hung, crashed or failed; nothing otherwise."""
        if self.exit_code == 0:
            return []
        how = (
            f"did not end in {TIMEOUT_S:.0f} s" if self.exit_code is None else f"ended with exit code {self.exit_code}"
        )
        last = (self.stderr.strip() or self.stdout.strip()).splitlines()[-1:]
        return [": ".join([f"{name} {how}", *last])]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The programs that ran on one machine, and their results."""

    commit: str
    system: str
    python: str
    memory_gb: float
    needs_gpu: bool
    kernels_run: Ended
    kernels: KernelReport | None
    """None if `mlx-k2 kernels --check` printed no report."""
    generate: Ended
    bit_identity: Ended


class _Printed(msgspec.Struct, frozen=True):
    report: KernelReport


def problems(report: Report) -> list[str]:
    """Return one line for each crash, hang, wrong number and wrong answer. A refused kernel is no problem."""
    found = [
        *report.kernels_run.problem("mlx-k2 kernels"),
        *report.generate.problem("mlx-k2 generate"),
        *report.bit_identity.problem("the tests of bit-identity"),
    ]
    found += [
        f"the {line.kernel} kernel computes wrong numbers: {line.reason or line.error}"
        for line in (report.kernels.kernels if report.kernels else ())
        if line.ran and not (line.error is not None and line.error <= ALLOWED_ERROR)
    ]
    if report.generate.exit_code == 0 and report.generate.stdout.strip() != ANSWER:
        found.append(f"two stages answered {report.generate.stdout.strip()!r}")
    if report.needs_gpu and not (report.kernels and report.kernels.chip):
        found.append("MLX found no GPU here: give --without-gpu where there is none")
    return found


def make_report(*, needs_gpu: bool) -> Report:
    """Run the installed mlx-k2 outside the source tree, then the tests of bit-identity in it."""
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


def _run(command: Sequence[str], folder: Path) -> Ended:
    """Run a command to its end. After TIMEOUT_S kill it and what it started."""
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return Ended(None, *process.communicate())
        return Ended(process.returncode, stdout, stderr)


def _kernel_report(printed: str) -> KernelReport | None:
    try:
        return msgspec.json.decode(printed, type=_Printed).report
    except msgspec.DecodeError:
        return None


def read_report(path: Path) -> Report:
    """Read a report that `run` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Report)


def row(report: Report) -> str:
    """Return the report's row of the table."""
    kernels = report.kernels
    lines = kernels.kernels if kernels else ()
    used = ", ".join(line.kernel for line in lines if line.usable) or "none"
    refused = ", ".join(line.kernel for line in lines if not line.ran) or "none"
    chip = (kernels.chip if kernels else None) or "no GPU"
    mlx = kernels.mlx_version if kernels else "-"
    found = "; ".join(problems(report)) or "none"
    return (
        f"| {chip} | {report.system} | {report.memory_gb:.0f} | {mlx}, {report.commit} | {used} | {refused} | {found} |"
    )


def table() -> str:
    """Return the table of all received reports, or a line that there are none."""
    reports = [read_report(path) for path in sorted(REPORTS.glob("*.json"))]
    if not reports:
        return "No report was received yet."
    header = "| chip | system | GB | mlx, commit | kernels used | refused by the device | problems |"
    return "\n".join([header, "|---" * 7 + "|", *map(row, reports)])


def with_table(page: str) -> str:
    """Return docs/tested-on.md with a new table."""
    return with_part(page, MADE_BY, table())


def main() -> int:
    """Run a subcommand; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--out", type=Path, required=True)
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
    found = problems(report)
    print(*(f"problem: {line}" for line in found), sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
