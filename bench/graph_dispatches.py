"""Counts the GPU launches of a function from its MLX graph, on any machine. Measures no time."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_k2.kernels.dispatch import Dispatch

# Primitives that only describe the same bytes anew when their input is row-contiguous, as it is wherever these counts
# are taken. Everything else is one launch.
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

KERNEL = "Depends"  # what stands for a kernel in the graph, see `kernel_in_graph`


def kernel_in_graph(dispatch: Dispatch) -> list[mx.array]:
    """Stands in for a kernel where there is no GPU: one node with the kernel's inputs and outputs."""
    outputs = [
        mx.zeros(shape, dtype) for shape, dtype in zip(dispatch.output_shapes, dispatch.output_dtypes, strict=True)
    ]
    mx.eval(outputs)
    return list(mx.depends(outputs, list(dispatch.inputs)))


def count_launches(function: Callable[..., mx.array], *inputs: mx.array) -> Counter[str]:
    """Launches by primitive of function(*inputs); what MLX fuses in a function that is compiled counts as one."""
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "graph.dot"
        mx.export_to_dot(str(graph), function(*inputs))
        labels = re.findall(r"\[label =\"([^\"]*)\", shape=rectangle\]", graph.read_text())
    return Counter(label for label in labels if label not in VIEWS)
