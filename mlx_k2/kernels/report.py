"""Results of `python -m mlx_k2.stage.measure_kernels`, which sends them as JSON to the command `mlx-k2 kernels`."""

import msgspec


class KernelLine(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel's check, and its speed in GB/s of the weights that ``tokens`` tokens need; None: it was not timed."""

    kernel: str
    usable: bool
    ran: bool
    """False if the device refused the kernel: it did not compile or did not start."""
    error: float | None
    """Largest error divided by the largest output, against plain MLX in float32. None: infinite, or it did not run."""
    reason: str
    """Why the kernel is not used; empty if it is."""
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
    """Speed of reading the packed weights with almost no computation; None: not measured."""
    plain_mlx_gb_per_s: float | None = None
    """Speed of the reference for one token; None: not measured."""
    kernels: tuple[KernelLine, ...] = ()
    sizes: dict[str, int] = {}
    """The best sizes of the kernels, by field of `Tuning`; empty: not measured."""


class IdleTime(msgspec.Struct, frozen=True):
    """Time to read ``held_bytes`` of GPU memory right after the last read, and after 5 s without GPU work."""

    held_bytes: int
    warm_seconds: float
    idle_seconds: float


class AttentionTime(msgspec.Struct, frozen=True):
    """Time of one layer's attention for a chunk of an 8k prompt, by MLX's fused kernel and unfused."""

    fused_seconds: float
    unfused_seconds: float


class DecodeTime(msgspec.Struct, frozen=True):
    """Time of one token through the feed-forward blocks of all layers with experts."""

    seconds: float
