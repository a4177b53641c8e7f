"""Kimi K2 models across two or more Apple-silicon Macs."""

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes longer than everything else in this file
    from mlx_k2.api import AsyncCluster, AsyncStream, Cluster, Completion, Content, Reasoning, Sampling, Stream
    from mlx_k2.errors import MlxK2Error

__version__ = "0.1.0"

__all__ = [
    "AsyncCluster",
    "AsyncStream",
    "Cluster",
    "Completion",
    "Content",
    "MlxK2Error",
    "Reasoning",
    "Sampling",
    "Stream",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Return a name of the Python API, which is imported when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mlx_k2 import api  # noqa: PLC0415 - here, so that importing the package loads nothing

    return getattr(api, name)
