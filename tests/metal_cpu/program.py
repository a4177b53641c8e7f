"""Compilation of a translated kernel with a host compiler, and its runs over numpy buffers."""

import enum
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from tests.metal_cpu.translate import RUNTIME, whole_program

Array = npt.NDArray[Any]
Grid = tuple[int, int, int]

BUILD = Path(__file__).parent / "build"
COMPILE_TIMEOUT_S = 120
RUN_TIMEOUT_S = 120


class Mode(enum.Enum):
    """Instrumentation of a run."""

    FAST = "none"
    ADDRESSES = "address and undefined-behaviour sanitizers: bounds and alignment of accesses"
    RACES = "thread sanitizer: data races between the threads of the grid"
    BYTES = "count of the bytes that the kernel loads from and stores to each buffer"


class Order(enum.Enum):
    """Order in which threadgroups and the threads of a threadgroup run, as executor.h numbers it."""

    FORWARD = 0
    BACKWARD = 1
    SHUFFLED = 2


class Schedule(NamedTuple):
    """Order of the threads, and the seed of Order.SHUFFLED."""

    order: Order
    seed: int = 1


FORWARD, BACKWARD, SHUFFLED = Schedule(Order.FORWARD), Schedule(Order.BACKWARD), Schedule(Order.SHUFFLED, 7)

# MLX's headers give warnings, and cast pointers against the rules of aliasing. A variable without a value gets a
# conspicuous one. Multiplications and additions are not contracted, so that each compiler rounds them alike.
_COMMON = ("-std=c++20", "-w", "-ftrivial-auto-var-init=pattern", "-fno-strict-aliasing", "-ffp-contract=off")
_FLAGS = {
    Mode.FAST: ("-O1", "-march=native", "-fno-math-errno"),
    Mode.ADDRESSES: (
        "-O1",
        "-g1",
        "-march=native",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-sanitize=shift,signed-integer-overflow",
        "-fno-omit-frame-pointer",
    ),
    Mode.RACES: ("-O1", "-g1", "-march=native", "-fsanitize=thread"),
    Mode.BYTES: ("-O2", "-march=native", "-fsanitize=thread"),
}
# In RACES and BYTES the runtime is not instrumented, so that only the kernel's own accesses are checked or counted.
_RUNTIME_FLAGS = {
    Mode.FAST: _FLAGS[Mode.FAST],
    Mode.ADDRESSES: _FLAGS[Mode.ADDRESSES],
    Mode.RACES: ("-O1", "-g", "-DWITH_TSAN=1"),
    Mode.BYTES: ("-O2", "-DWITH_COUNT=1"),
}
_LINK_FLAGS = {
    Mode.FAST: (),
    Mode.ADDRESSES: ("-fsanitize=address,undefined",),
    Mode.RACES: ("-fsanitize=thread",),
    Mode.BYTES: (),
}


class KernelFault(Exception):
    """Fault of a kernel that the executor or a sanitizer found. The message is their report."""


class CompileFault(Exception):
    """Refusal of a kernel by the host compiler. It is no KernelFault: a kernel with a planted fault must compile."""


class Traffic(NamedTuple):
    """Bytes that the loads and stores of one buffer moved."""

    loaded: int
    stored: int


class RunReport(NamedTuple):
    """Measurements of a run."""

    seconds: float
    simd_operations: int
    barriers: int
    traffic: tuple[Traffic, ...]
    """Traffic of each buffer in Mode.BYTES; empty in other modes."""


@functools.cache
def compiler() -> str:
    """Return the path of g++, or of clang++ if there is no g++. Skip the test if there is neither."""
    for name in ("g++", "clang++"):
        if path := shutil.which(name):
            return path
    pytest.skip("needs g++: apt-get install g++")


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


def _compile(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    if result.returncode:
        raise CompileFault(f"does not compile:\n{result.stderr[:6000]}")


@functools.cache
def _runtime_text() -> str:
    return "".join(path.read_text() for path in sorted(RUNTIME.rglob("*")) if path.is_file())


@functools.cache
def _runtime_objects(mode: Mode) -> tuple[str, ...]:
    objects = []
    for name in ("executor", "main", "count"):
        flags = (compiler(), *_COMMON, *_RUNTIME_FLAGS[mode])
        target = BUILD / f"{name}_{_digest(flags, _runtime_text())}.o"
        if not target.exists():
            scratch = target.with_suffix(f".{os.getpid()}")
            _compile([*flags, "-c", str(RUNTIME / f"{name}.cpp"), "-o", str(scratch)])
            scratch.replace(target)
        objects.append(str(target))
    return tuple(objects)


def _executable(cpp: str, mode: Mode) -> Path:
    BUILD.mkdir(exist_ok=True)
    flags = (compiler(), *_COMMON, *_FLAGS[mode], f"-I{RUNTIME}")
    target = BUILD / f"kernel_{_digest(flags, _runtime_text(), cpp)}"
    if not target.exists():
        source = target.with_suffix(f".{os.getpid()}.cpp")
        source.write_text(cpp)
        kernel = source.with_suffix(".o")
        try:
            _compile([*flags, "-c", str(source), "-o", str(kernel)])
            scratch = source.with_suffix("")
            link = (compiler(), *_LINK_FLAGS[mode], str(kernel), *_runtime_objects(mode), "-lpthread")
            _compile([*link, "-o", str(scratch)])
            scratch.replace(target)
        finally:
            kernel.unlink(missing_ok=True)
            source.unlink(missing_ok=True)
    return target


class Program:
    """Compiled instantiation of a Metal kernel."""

    def __init__(
        self,
        source: str,
        kernel: str,
        template: dict[str, str],
        *,
        headers: Sequence[str] = (),
        constants: str = "",
        mode: Mode = Mode.FAST,
    ) -> None:
        self.mode = mode
        self._executable = _executable(whole_program(source, kernel, template, headers, constants), mode)

    def __call__(
        self,
        buffers: Sequence[Array | Path],
        outputs: frozenset[int],
        grid: Grid,
        threadgroup: Grid,
        schedule: Schedule = FORWARD,
    ) -> tuple[list[Array], RunReport]:
        """Run the grid. `grid` and `threadgroup` count threads.

        `buffers` are in the order of the kernel's arguments; a Path is a file with an input. The
        buffers whose indices are in `outputs` are filled with 0xFF before the run, and returned after it.

        Raises:
            KernelFault: the executor or a sanitizer reports a fault.
        """
        # In RACES each fiber counts as a thread: one OS thread shows all races, in the same order in each run.
        os_threads = 1 if self.mode is Mode.RACES else os.cpu_count()
        lines = [
            "grid {} {} {}".format(*grid),
            "threadgroup {} {} {}".format(*threadgroup),
            f"os_threads {os_threads}",
            f"schedule {schedule.order.value} {schedule.seed}",
        ]
        scratch = "/dev/shm" if Path("/dev/shm").is_dir() else None
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            for number, buffer in enumerate(buffers):
                path = Path(folder) / str(number)
                if isinstance(buffer, Path):
                    lines.append(f"in {buffer} {buffer.stat().st_size}")
                elif number in outputs:
                    lines.append(f"out {path} {buffer.nbytes}")
                else:
                    np.ascontiguousarray(buffer).tofile(path)
                    lines.append(f"in {path} {buffer.nbytes}")
            job = Path(folder) / "job"
            job.write_text("\n".join(lines) + "\n")
            report = self._run(job)
            results = []
            for number, buffer in enumerate(buffers):
                if number in outputs:
                    assert isinstance(buffer, np.ndarray)
                    results.append(np.fromfile(Path(folder) / str(number), dtype=buffer.dtype).reshape(buffer.shape))
        return results, report

    def _run(self, job: Path) -> RunReport:
        # The redzones are wide, so that an access far beyond a buffer does not reach another one unnoticed.
        environment = os.environ | {
            "ASAN_OPTIONS": "detect_leaks=0:redzone=2048:max_redzone=2048:detect_stack_use_after_return=0",
            "TSAN_OPTIONS": "halt_on_error=1 exitcode=87 report_signal_unsafe=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        result = subprocess.run(
            [str(self._executable), str(job)], capture_output=True, text=True, env=environment, timeout=RUN_TIMEOUT_S
        )
        if result.returncode:
            raise KernelFault(f"exit status {result.returncode}\n{result.stdout}{result.stderr[:4000]}")
        match = re.search(r"seconds ([\d.]+) simd_operations (\d+) barriers (\d+)", result.stdout)
        assert match, result.stdout
        counts = re.findall(r"buffer \d+ loaded (\d+) stored (\d+)", result.stdout)
        traffic = tuple(Traffic(int(loaded), int(stored)) for loaded, stored in counts)
        return RunReport(float(match[1]), int(match[2]), int(match[3]), traffic)
