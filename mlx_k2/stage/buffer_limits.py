"""Limits of one GPU command buffer on this machine, if `mlx-k2 kernels` measured better ones than MLX's own.

MLX reads both limits from the environment once. A stage therefore sets them before it imports mlx. Standard library
only.
"""

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

from mlx_k2.json_text.parse import parse_json
from mlx_k2.private_files import home_folder

FILE = home_folder() / ".cache" / "mlx-k2" / "kernels" / "buffer_limits.json"


class BufferLimits(NamedTuple):
    """Number of operations, and megabytes that they access, at which MLX submits a command buffer to the GPU."""

    operations: int
    megabytes: int

    def environment(self) -> dict[str, str]:
        """Return the environment variables that set these limits in MLX."""
        return {"MLX_MAX_OPS_PER_BUFFER": str(self.operations), "MLX_MAX_MB_PER_BUFFER": str(self.megabytes)}


def save_limits(limits: BufferLimits | None, file: Path = FILE) -> None:
    """Save the best limits for this machine and mlx version. None deletes the file, so that MLX's own apply."""
    if limits is None:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(_measured_with() | limits._asdict()) + "\n", encoding="utf-8")


def load_limits(file: Path = FILE) -> BufferLimits | None:
    """Return the saved limits, or None if none were measured on this machine with this mlx version."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = parse_json(file.read_bytes())
        if isinstance(content, dict) and content.items() >= _measured_with().items():
            return BufferLimits(int(content["operations"]), int(content["megabytes"]))
    return None


def apply_saved_limits(environment: MutableMapping[str, str], file: Path = FILE) -> None:
    """Set the saved limits in ``environment``. Keep variables that are already set: the user chose them."""
    limits = load_limits(file)
    for name, value in ({} if limits is None else limits.environment()).items():
        environment.setdefault(name, value)


def _measured_with() -> dict[str, str]:
    return {"host": platform.node(), "mlx": importlib.metadata.version("mlx")}
