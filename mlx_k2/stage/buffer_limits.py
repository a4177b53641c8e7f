"""How much work goes into one GPU command buffer on this machine, where `mlx-k2 kernels` found better than MLX's own.

MLX reads both limits from the environment, once, so a stage sets them before it imports mlx. Standard library only.
"""

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

FILE = Path.home() / ".cache" / "mlx-k2" / "kernels" / "buffer_limits.json"


class BufferLimits(NamedTuple):
    """A command buffer is handed to the GPU when it has so many operations, or they touch so many megabytes."""

    operations: int
    megabytes: int

    def environment(self) -> dict[str, str]:
        """As MLX wants to hear of them."""
        return {"MLX_MAX_OPS_PER_BUFFER": str(self.operations), "MLX_MAX_MB_PER_BUFFER": str(self.megabytes)}


def save_limits(limits: BufferLimits | None, file: Path = FILE) -> None:
    """Keep what was best for this machine and this mlx; None: MLX's own."""
    if limits is None:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(_measured_with() | limits._asdict()) + "\n", encoding="utf-8")


def load_limits(file: Path = FILE) -> BufferLimits | None:
    """What was best; None where nothing was measured on this machine with this mlx."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.items() >= _measured_with().items():
            return BufferLimits(int(content["operations"]), int(content["megabytes"]))
    return None


def apply_saved_limits(environment: MutableMapping[str, str], file: Path = FILE) -> None:
    """Put what was best into ``environment``; what already stands there is somebody's wish."""
    limits = load_limits(file)
    for name, value in ({} if limits is None else limits.environment()).items():
        environment.setdefault(name, value)


def _measured_with() -> dict[str, str]:
    return {"host": platform.node(), "mlx": importlib.metadata.version("mlx")}
