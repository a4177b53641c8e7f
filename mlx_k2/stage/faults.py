"""What the coordinator is told of an error that ends a stage, whatever it is."""

from mlx_k2.errors import MlxK2Error, NeighbourLost, StageFault
from mlx_k2.protocol.messages import Fault
from mlx_k2.stage.host import peak_resident_bytes

_LOST_NEIGHBOUR = ("[ring]", "[jaccl]")
"""How the errors of mlx.distributed's backends begin; MLX raises all of its errors as RuntimeError."""
_OUT_OF_MEMORY = (
    "bad_alloc",
    "Unable to allocate",
    "Insufficient Memory",
    "Cannot allocate memory",
    "Resource temporarily unavailable",  # no room for a new thread's stack
)
"""In errors of MLX, of C++ and of the system."""


def fault_of(error: Exception) -> Fault:
    """An error of our own as it is; a lost neighbour and refused memory by what they are; others by their class."""
    if isinstance(error, MlxK2Error):
        return Fault(type(error).__name__, str(error))
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY):
        return Fault(
            StageFault.__name__,
            f"out of memory: the system refused it more than the {peak_resident_bytes() / 1e9:.1f} GB that it had: "
            "end other programs there, or give --split, a smaller --context or --dense-bits",
        )
    kind = NeighbourLost if text.startswith(_LOST_NEIGHBOUR) else type(error)
    return Fault(kind.__name__, f"{type(error).__name__}: {error}")
