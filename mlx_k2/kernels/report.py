"""What `python -m mlx_k2.stage.measure_kernels` finds on a machine, as it travels to the command that shows it."""

import msgspec


class KernelLine(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel. GB/s are of the weights that ``tokens`` tokens need; None: it did not run, or is not timed."""

    kernel: str
    usable: bool
    error: float | None
    """Largest error by largest output, against plain MLX in float32."""
    reason: str
    tokens: int | None = None
    gb_per_s: float | None = None
    plain_mlx_gb_per_s: float | None = None


class KernelReport(msgspec.Struct, frozen=True, kw_only=True):
    """A machine's kernels for one layer of Kimi K2. ``chip`` is None without a GPU: then there are no kernels."""

    mlx_k2_version: str
    mlx_version: str
    system: str
    chip: str | None
    read_gb_per_s: float | None
    """How fast the same weights are read when nothing is computed."""
    plain_mlx_gb_per_s: float
    """The reference for one token."""
    kernels: tuple[KernelLine, ...] = ()
    sizes: dict[str, int] = {}
    """The best sizes of the kernels, by measurement; empty where that was not possible."""


class DecodeTime(msgspec.Struct, frozen=True):
    """One token through the feed-forward blocks of all layers with experts."""

    seconds: float
