"""Disk cache of the kernel checks and of the best measured sizes of kernels on this machine. Knows no kernel.

Each combination of mlx version, macOS build, chip, kernel texts and layer shape has its own JSON file: after a change
of any of them all checks are made again. A process that makes checks holds a lock, so that a second stage on the
machine waits and then finds the results.
"""

import contextlib
import fcntl
import functools
import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import msgspec

from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import read_json
from mlx_k2.kernels.dispatch import metal_texts
from mlx_k2.kernels.self_check import KernelCheck, LayerShape
from mlx_k2.kernels.tuning import Tuning
from mlx_k2.private_files import home_folder, write_atomically

DEFAULT_DIRECTORY = home_folder() / ".cache" / "mlx-k2" / "kernels"
LOCK_TIMEOUT_S = 600.0
"""Time to wait for another process that makes checks. Then this process makes them without the lock."""


@functools.cache
def macos_build() -> str:
    """Return the build of macOS, which includes the compiler of kernels; empty on other systems."""
    if sys.platform != "darwin":
        return ""
    return subprocess.run(["/usr/bin/sw_vers", "-buildVersion"], stdout=subprocess.PIPE, text=True, check=False).stdout


@contextlib.contextmanager
def locked(path: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the lock of a cache file in this context. The system releases the lock if this process ends.

    Continue without the lock if the directory is not writable, or if another process holds it for ``timeout_s``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with file:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        yield


class CachedChecks(msgspec.Struct, frozen=True):
    """Check results and best sizes of this machine's kernels for one layer shape."""

    checks: list[KernelCheck]
    tuning: Tuning | None  # None until measured on this machine
    started: dict[str, int] = {}  # by kernel: number of checks that were started and did not finish

    def with_check(self, check: KernelCheck) -> "CachedChecks":
        """Return a copy with a finished check, in place of the kernel's earlier result and unfinished checks."""
        others = [other for other in self.checks if other.kernel != check.kernel]
        started = {name: count for name, count in self.started.items() if name != check.kernel}
        return msgspec.structs.replace(self, checks=[*others, check], started=started)

    def with_start(self, kernel: str) -> "CachedChecks":
        """Return a copy in which one more check of ``kernel`` has been started."""
        return msgspec.structs.replace(self, started={**self.started, kernel: self.started.get(kernel, 0) + 1})


def cache_path(directory: Path, shape: LayerShape, chip: str) -> Path:
    """Return the path of the cache file for a chip and layer shape with this mlx, macOS and these kernel texts."""
    key = "\0".join((version("mlx"), macos_build(), chip, *map(str, shape), *metal_texts()))
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return directory / f"{digest}.json"


def load(path: Path) -> CachedChecks | None:
    """Return the cached checks, or None if the file does not exist or cannot be parsed."""
    try:
        return read_json(path.read_bytes(), CachedChecks)
    except (OSError, JsonError):
        return None


def store(path: Path, cached: CachedChecks) -> None:
    """Write the file atomically. Ignore a directory that is not writable: the next start then repeats the checks."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, msgspec.json.encode(cached), 0o644)
