"""Number of GPU dispatches of a function, counted from its MLX graph on any machine. Measures no time."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_k2.kernels.dispatch import Dispatch

# Primitives that only reinterpret the bytes of a row-contiguous input. Inputs are row-contiguous wherever these counts
# are taken. Every other primitive is one dispatch.
VIEWS = frozenset(
    {
        "AsStrided",
        "Broadcast",
        "BroadcastAxes",
        "Copy",
        "ExpandDims",
        "Flatten",
        "Reshape",
        "Slice",
        "Squeeze",
        "StopGradient",
        "Transpose",
        "Unflatten",
    }
)

KERNEL = "Depends"  # the primitive that replaces a kernel in the graph, see `kernel_in_graph`


def kernel_in_graph(dispatch: Dispatch) -> list[mx.array]:
    """Replace a kernel where there is no GPU: return one graph node with the kernel's inputs and outputs."""
    outputs = [
        mx.zeros(shape, dtype) for shape, dtype in zip(dispatch.output_shapes, dispatch.output_dtypes, strict=True)
    ]
    mx.eval(outputs)
    return list(mx.depends(outputs, list(dispatch.inputs)))


def count_dispatches(function: Callable[..., mx.array], *inputs: mx.array) -> Counter[str]:
    """Count the dispatches of function(*inputs) by primitive. What MLX fuses in a compiled function counts as one."""
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "graph.dot"
        mx.export_to_dot(str(graph), function(*inputs))
        labels = re.findall(r"\[label =\"([^\"]*)\", shape=rectangle\]", graph.read_text())
    return Counter(label for label in labels if label not in VIEWS)
