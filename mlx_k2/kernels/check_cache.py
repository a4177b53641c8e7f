"""Remembers on disk which kernels this machine may use, and the sizes measured best. Knows no kernel.

One small JSON file for each combination of mlx version, chip, kernel texts and layer shape: a change of any of them
means that nothing is known yet.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from mlx_k2.kernels.dispatch import metal_texts
from mlx_k2.kernels.self_check import KernelCheck, LayerShape
from mlx_k2.kernels.tuning import Tuning

DEFAULT_DIRECTORY = Path.home() / ".cache" / "mlx-k2" / "kernels"


def mlx_version() -> str:
    """The version of the installed mlx."""
    return importlib.metadata.version("mlx")


class CachedChecks(NamedTuple):
    """What is known of this machine's kernels."""

    checks: list[KernelCheck]
    tuning: Tuning | None  # None until it was measured here

    def with_check(self, check: KernelCheck) -> "CachedChecks":
        """One kernel more."""
        return self._replace(checks=[*self.checks, check])


def cache_path(directory: Path, shape: LayerShape, chip: str) -> Path:
    """The file for this mlx, this chip, these kernels and this layer."""
    parts = (mlx_version(), chip, *map(str, shape), *metal_texts())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return directory / f"{digest}.json"


def load(path: Path) -> CachedChecks | None:
    """What was remembered, or None: no file, or one that cannot be read."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        checks = [KernelCheck(**check) for check in content["checks"]]
        tuning = None if content["tuning"] is None else Tuning(**content["tuning"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return CachedChecks(checks, tuning)


def store(path: Path, cached: CachedChecks, chip: str) -> None:
    """Writes the file whole or not at all. A directory that cannot be written only costs the next start a check."""
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
