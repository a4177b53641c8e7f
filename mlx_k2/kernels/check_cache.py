"""Disk cache of the kernel checks and the best measured sizes of this machine. Knows no kernel.

Each combination of mlx version, macOS build, chip, kernel texts and layer shape has its own small JSON file. After a
change of any of them nothing is cached yet. A process that checks holds a lock: of two stages on one machine the second
finds the results of the first.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from mlx_k2.json_text.parse import parse_json
from mlx_k2.kernels.dispatch import metal_texts
from mlx_k2.kernels.self_check import KernelCheck, LayerShape
from mlx_k2.kernels.tuning import Tuning
from mlx_k2.private_files import home_folder

DEFAULT_DIRECTORY = home_folder() / ".cache" / "mlx-k2" / "kernels"
LOCK_S = 600.0
"""Time to wait for another process that checks. After it this process checks without the lock."""


def mlx_version() -> str:
    """Return the version of the installed mlx."""
    return importlib.metadata.version("mlx")


@functools.cache
def macos_build() -> str:
    """Return macOS's build, whose compiler makes the kernels; empty on other systems."""
    if sys.platform != "darwin":
        return ""
    return subprocess.run(["/usr/bin/sw_vers", "-buildVersion"], stdout=subprocess.PIPE, text=True, check=False).stdout


@contextlib.contextmanager
def locked(path: Path, timeout_s: float = LOCK_S) -> Iterator[None]:
    """Hold the lock of a cache file. The system releases it if this process ends.

    A directory that is not writable, and a process that holds the lock for ``timeout_s``, are ignored.
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


class CachedChecks(NamedTuple):
    """Check results and best sizes of this machine's kernels for one layer shape."""

    checks: list[KernelCheck]
    tuning: Tuning | None  # None until measured on this machine
    started: Mapping[str, int] = MappingProxyType({})  # checks that were started and have not come back, by kernel

    def with_check(self, check: KernelCheck) -> "CachedChecks":
        """Return a copy with the result of a check that came back."""
        others = [each for each in self.checks if each.kernel != check.kernel]
        started = {name: count for name, count in self.started.items() if name != check.kernel}
        return self._replace(checks=[*others, check], started=started)

    def with_start(self, kernel: str) -> "CachedChecks":
        """Return a copy in which one more check of ``kernel`` has been started."""
        return self._replace(started={**self.started, kernel: self.started.get(kernel, 0) + 1})


def cache_path(directory: Path, shape: LayerShape, chip: str) -> Path:
    """Return the path of the cache file for this mlx version, macOS build, chip, layer shape and the kernel texts."""
    parts = (mlx_version(), macos_build(), chip, *map(str, shape), *metal_texts())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return directory / f"{digest}.json"


def load(path: Path) -> CachedChecks | None:
    """Return the cached checks, or None if the file does not exist or cannot be parsed."""
    try:
        content: dict[str, Any] = parse_json(path.read_bytes())
        checks = [KernelCheck(**check)._replace(slower=tuple(check["slower"])) for check in content["checks"]]
        tuning = None if content["tuning"] is None else Tuning(**content["tuning"])
        started = {str(name): int(count) for name, count in content["started"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return CachedChecks(checks, tuning, started)


def store(path: Path, cached: CachedChecks, chip: str) -> None:
    """Write the file atomically. Ignore a directory that is not writable: the next start then repeats the checks."""
    content = {
        "mlx": mlx_version(),
        "chip": chip,
        "checks": [check._asdict() for check in cached.checks],
        "tuning": cached.tuning._asdict() if cached.tuning else None,
        "started": dict(cached.started),
    }
    scratch = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink()
