"""Counter of the GPU dispatches of a function. It reads the function's MLX graph, so it needs no GPU."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_k2.kernels.dispatch import Dispatch

# Primitives that reinterpret the bytes of a row-contiguous input without a dispatch. Every other primitive is one
# dispatch. The counts are right only for functions whose inputs are row-contiguous.
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

KERNEL = "Depends"
"""The primitive by which `kernel_in_graph` replaces a kernel."""


def kernel_in_graph(dispatch: Dispatch) -> list[mx.array]:
    """Return the outputs of one graph node that has the inputs and output shapes of the kernel. It computes zeros."""
    outputs = [
        mx.zeros(shape, dtype) for shape, dtype in zip(dispatch.output_shapes, dispatch.output_dtypes, strict=True)
    ]
    mx.eval(outputs)
    return list(mx.depends(outputs, list(dispatch.inputs)))


def count_dispatches(function: Callable[..., mx.array], *inputs: mx.array) -> Counter[str]:
    """Count the dispatches of function(*inputs) by primitive. Operations that MLX fuses are one primitive."""
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "graph.dot"
        mx.export_to_dot(str(graph), function(*inputs))
        labels = re.findall(r"\[label =\"([^\"]*)\", shape=rectangle\]", graph.read_text())
    return Counter(label for label in labels if label not in VIEWS)
