"""Disk cache of the kernel checks and the best measured sizes of this machine. Knows no kernel.

Each combination of mlx version, chip, kernel texts and layer shape has its own small JSON file. After a change of any
of them nothing is cached yet.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from mlx_k2.json_text.parse import parse_json
from mlx_k2.kernels.dispatch import metal_texts
from mlx_k2.kernels.self_check import KernelCheck, LayerShape
from mlx_k2.kernels.tuning import Tuning
from mlx_k2.private_files import home_folder

DEFAULT_DIRECTORY = home_folder() / ".cache" / "mlx-k2" / "kernels"


def mlx_version() -> str:
    """Return the version of the installed mlx."""
    return importlib.metadata.version("mlx")


class CachedChecks(NamedTuple):
    """Check results and best sizes of this machine's kernels for one layer shape."""

    checks: list[KernelCheck]
    tuning: Tuning | None  # None until measured on this machine

    def with_check(self, check: KernelCheck) -> "CachedChecks":
        """Return a copy with ``check`` added."""
        return self._replace(checks=[*self.checks, check])


def cache_path(directory: Path, shape: LayerShape, chip: str) -> Path:
    """Return the path of the cache file for this mlx version, chip, layer shape and the kernel texts."""
    parts = (mlx_version(), chip, *map(str, shape), *metal_texts())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return directory / f"{digest}.json"


def load(path: Path) -> CachedChecks | None:
    """Return the cached checks, or None if the file does not exist or cannot be parsed."""
    try:
        content: dict[str, Any] = parse_json(path.read_bytes())
        checks = [KernelCheck(**check) for check in content["checks"]]
        tuning = None if content["tuning"] is None else Tuning(**content["tuning"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return CachedChecks(checks, tuning)


def store(path: Path, cached: CachedChecks, chip: str) -> None:
    """Write the file atomically. Ignore a directory that is not writable: the next start then repeats the checks."""
    content = {
        "mlx": mlx_version(),
        "chip": chip,
        "checks": [check._asdict() for check in cached.checks],
        "tuning": cached.tuning._asdict() if cached.tuning else None,
    }
    scratch = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink()
