"""MLX's settings on this machine. MLX reads them from the environment once, so a stage sets them before it imports mlx.

The settings are for Macs: the limits of one GPU command buffer, a thread that keeps GPU memory wired, and float32
products in full precision. docs/design/0100 has the reasons. Imports no MLX.
"""

import contextlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

from mlx_k2.json_text.parse import parse_json
from mlx_k2.private_files import home_folder

FILE = home_folder() / ".cache" / "mlx-k2" / "kernels" / "buffer_limits.json"


class BufferLimits(NamedTuple):
    """Limits at which MLX submits a command buffer: the number of operations, and the array elements that they access.

    The elements are counted in units of 2^20, which MLX calls megabytes. An operation that reads a part of an array
    counts with the whole array. Both None: MLX's defaults, which depend on the chip.
    """

    operations: int | None
    megabytes: int | None

    def environment(self) -> dict[str, str]:
        """Return the environment variables that set these limits in MLX."""
        if self.operations is None:
            return {}
        return {"MLX_MAX_OPS_PER_BUFFER": str(self.operations), "MLX_MAX_MB_PER_BUFFER": str(self.megabytes)}


MLX_DEFAULTS = BufferLimits(None, None)
LONG_BUFFERS = BufferLimits(100, 1_000_000)
"""About three layers in one command buffer. There is no effective limit of megabytes: a stack of 384 experts counts as
840, so with a limit each operation that reads one would end a buffer, which costs 20 us (published for an M3 Ultra)."""
_KEEP_WIRED = {"MLX_METAL_RESIDENCY_REFRESH_INTERVAL_MS": "500"}
"""macOS 26 unwires GPU memory after 1 s without GPU work. Wiring 300 GB again takes 5 s or more."""
_FULL_FLOAT32 = {"MLX_ENABLE_TF32": "0"}
"""From the M5 on MLX rounds the factors of float32 products to 11 bits. Prompts would then choose other experts."""


def chip_name() -> str | None:
    """Return the chip's name as macOS reports it, for instance "Apple M3 Ultra"; None on other systems."""
    if sys.platform != "darwin":
        return None
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.strip()


def default_limits(chip: str | None) -> BufferLimits:
    """Return the limits for a chip on which none were measured. From the M5 on long buffers are not faster."""
    return LONG_BUFFERS if is_before_m5(chip) else MLX_DEFAULTS


def is_before_m5(chip: str | None) -> bool:
    """Return whether the chip is an M1 to M4, whose GPU has no matrix units."""
    generation = re.match(r"Apple M(\d+)", chip or "")
    return generation is not None and int(generation[1]) < 5


def save_limits(limits: BufferLimits, file: Path = FILE) -> None:
    """Save the best limits for this host and mlx version."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(_host_and_version() | limits._asdict()) + "\n", encoding="utf-8")


def load_limits(file: Path = FILE) -> BufferLimits | None:
    """Return the saved limits; None if none were measured on this host with this mlx version."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = parse_json(file.read_bytes())
        if isinstance(content, dict) and content.items() >= _host_and_version().items():
            if content["operations"] is content["megabytes"] is None:
                return MLX_DEFAULTS
            return BufferLimits(int(content["operations"]), int(content["megabytes"]))
    return None


def apply_settings(environment: MutableMapping[str, str], chip: str | None, file: Path = FILE) -> tuple[str, ...]:
    """Set MLX's settings in ``environment``. Keep variables that are already set: the user chose them.

    Return a line for the user about each of these variables that has another value.
    """
    settings = (load_limits(file) or default_limits(chip)).environment()
    if chip is not None:
        settings |= _KEEP_WIRED | _FULL_FLOAT32
    warnings = []
    for name, value in settings.items():
        if environment.setdefault(name, value) != value:
            warnings.append(f"{name}={environment[name]} from the environment is kept; mlx-k2 would set {value}")
    return tuple(warnings)


def _host_and_version() -> dict[str, str]:
    return {"host": platform.node(), "mlx": importlib.metadata.version("mlx")}
