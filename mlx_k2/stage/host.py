"""Facts about this machine and its installation, the stage's memory use, and the GPU's memory limit."""

import platform
import resource
import socket
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import psutil

from mlx_k2 import __version__
from mlx_k2.errors import StageStartError
from mlx_k2.protocol.messages import Hello
from mlx_k2.stage.registry import running_stages

WIRED_LIMIT_SETTING = "iogpu.wired_limit_mb"
CACHE_LIMIT_BYTES = 8 * 2**30
"""Limit of the freed buffers that MLX keeps for reuse. It is needed, because each chunk of a long prompt needs larger
buffers than the one before, and MLX would keep the smaller ones, too."""
_SMALLEST_CACHE_LIMIT_BYTES = 512 * 2**20


def hello() -> Hello:
    """Return the first message of a stage."""
    return Hello(
        mlx_k2_version=__version__,
        mlx_version=version("mlx"),
        python_version=platform.python_version(),
        system=f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform(terse=True),
        memory_bytes=psutil.virtual_memory().total,
        working_set_bytes=working_set_bytes(),
        running_stages=running_stages(),
    )


def on_gpu() -> bool:
    """Return whether MLX computes on a GPU on this host."""
    return bool(mx.default_device() == mx.Device(mx.gpu))


def working_set_bytes() -> int | None:
    """Return the bytes of memory that macOS allows the GPU; None without a Metal GPU."""
    if not (on_gpu() and mx.metal.is_available()):
        return None
    return int(mx.device_info()["max_recommended_working_set_size"])


def check_memory(needed_bytes: int) -> None:
    """Check that macOS allows the GPU ``needed_bytes`` of weights, cache and working space.

    Raises:
        StageStartError: macOS allows less. The message names the setting to change.
    """
    limit_bytes = working_set_bytes()
    if limit_bytes is not None and needed_bytes > limit_bytes:
        command = f"run `sudo sysctl {WIRED_LIMIT_SETTING}={-(-needed_bytes // 2**20)}` there, or "
        command_if_enough = command if needed_bytes < psutil.virtual_memory().total else ""
        raise StageStartError(
            f"{socket.gethostname()} needs {needed_bytes / 1e9:.1f} GB of GPU memory and macOS allows "
            f"{limit_bytes / 1e9:.1f} GB: {command_if_enough}give it fewer layers with --split"
        )


def wire_memory(needed_bytes: int) -> None:
    """Let MLX wire ``needed_bytes`` and the buffers that it keeps for reuse. Decode is slow if weights are not wired.

    Call this once the weights are in memory: each new buffer of a wired process costs a request to macOS. Without a
    Metal GPU do nothing.
    """
    limit_bytes = working_set_bytes()
    if limit_bytes is None:
        return
    cache_bytes = max(_SMALLEST_CACHE_LIMIT_BYTES, min(CACHE_LIMIT_BYTES, limit_bytes - needed_bytes))
    mx.set_cache_limit(cache_bytes)
    mx.set_wired_limit(min(needed_bytes + cache_bytes, limit_bytes))


def peak_bytes() -> int:
    """Return the peak memory of this process so far, in bytes: MLX's count or the peak resident set size, if larger."""
    return max(mx.get_peak_memory(), peak_resident_bytes())


def peak_resident_bytes() -> int:
    """Return the peak resident set size of this process in bytes.

    Linux's getrusage cannot be used: its peak includes that of the process that started this one.
    """
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kilobytes) * 1024
