"""Conversion of an error that ends a stage to the Fault that the coordinator receives."""

from mlx_k2.errors import MlxK2Error, NeighbourLost, StageFault
from mlx_k2.protocol.messages import Fault
from mlx_k2.stage.host import peak_resident_bytes

_BACKEND_PREFIXES = ("[ring]", "[jaccl]")
"""Prefixes of the error messages of mlx.distributed's backends. MLX raises all of its errors as RuntimeError."""
_OUT_OF_MEMORY_TEXTS = (
    "bad_alloc",
    "Unable to allocate",
    "Insufficient Memory",
    "Cannot allocate memory",
    "Resource temporarily unavailable",  # no memory for a new thread's stack
)
"""Substrings of out-of-memory errors of MLX, of C++ and of the system."""
_GPU_STOPPED_TEXTS = ("GPU Timeout", "Impacting Interactivity")
"""Substrings of Metal's errors for a command buffer that macOS ended because it ran too long."""


def fault_of(error: Exception) -> Fault:
    """Return the Fault for an error.

    An MlxK2Error keeps its class and text. An error of mlx.distributed becomes NeighbourLost. Refused memory and GPU
    work that macOS stopped become StageFault. All other errors keep their class.
    """
    if isinstance(error, MlxK2Error):
        return Fault(type(error).__name__, str(error))
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY_TEXTS):
        return Fault(
            StageFault.__name__,
            f"out of memory: this process had {peak_resident_bytes() / 1e9:.1f} GB, and the system refused more: "
            "end other programs there, or give --split, a smaller --context or --dense-bits",
        )
    if any(sign in text for sign in _GPU_STOPPED_TEXTS):
        return Fault(
            StageFault.__name__,
            "macOS stopped the GPU's work because it took too long: turn the display off, or set "
            f"AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the hostfile's envs ({text})",
        )
    error_class = NeighbourLost if text.startswith(_BACKEND_PREFIXES) else type(error)
    return Fault(error_class.__name__, f"{type(error).__name__}: {error}")
