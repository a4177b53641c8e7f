"""Result types of `python -m mlx_k2.stage.measure_kernels`, sent to the command that displays them."""

import msgspec


class KernelLine(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel. GB/s count the weights that ``tokens`` tokens need; None if it did not run or is not timed."""

    kernel: str
    usable: bool
    ran: bool
    """False if the device refused the kernel: it did not compile or did not start."""
    error: float | None
    """Largest error divided by the largest output, against plain MLX in float32. JSON has null for an infinite one."""
    reason: str
    tokens: int | None = None
    gb_per_s: float | None = None
    plain_mlx_gb_per_s: float | None = None


class KernelReport(msgspec.Struct, frozen=True, kw_only=True):
    """A machine's kernels for one layer of Kimi K2. Without a GPU ``chip`` is None and there are no kernels."""

    mlx_k2_version: str
    mlx_version: str
    system: str
    chip: str | None
    read_gb_per_s: float | None = None
    """Read speed of the same weights when nothing is computed; None if not measured."""
    plain_mlx_gb_per_s: float | None = None
    """Speed of the reference for one token; None if not measured."""
    kernels: tuple[KernelLine, ...] = ()
    sizes: dict[str, int] = {}
    """The best measured sizes of the kernels; empty if they could not be measured."""


class IdleTime(msgspec.Struct, frozen=True):
    """Time to read ``held_bytes`` of GPU memory right after the last read, and after seconds without GPU work."""

    held_bytes: int
    warm_seconds: float
    idle_seconds: float


class AttentionTime(msgspec.Struct, frozen=True):
    """Time of a layer's attention for a chunk of an 8k prompt: MLX's fused kernel in small blocks, and unfused."""

    fused_seconds: float
    unfused_seconds: float


class DecodeTime(msgspec.Struct, frozen=True):
    """Time of one token through the feed-forward blocks of all layers with experts."""

    seconds: float
