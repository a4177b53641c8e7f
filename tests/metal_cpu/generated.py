"""Generation of the source that MLX would pass to Apple's compiler for a dispatch, on a machine without Metal."""

import os
import re
import tempfile
import threading
from pathlib import Path

import mlx.core as mx

from mlx_k2.kernels.dispatch import Dispatch, metal_kernel


def generated_source(dispatch: Dispatch) -> str:
    """Return the source that MLX generates for a dispatch.

    Without Metal, MLX generates it while a function that calls the kernel is exported, and `verbose` prints it.
    """
    kernel = metal_kernel(dispatch.text)

    def call_kernel(*inputs: mx.array) -> tuple[mx.array, ...]:
        outputs = kernel(
            inputs=list(inputs),
            template=list(dispatch.template) or None,
            grid=dispatch.grid,
            threadgroup=dispatch.threadgroup,
            output_shapes=list(dispatch.output_shapes),
            output_dtypes=list(dispatch.output_dtypes),
            verbose=True,
        )
        return tuple(outputs)

    with tempfile.TemporaryDirectory() as folder, _CapturedStdout() as stdout:
        mx.export_function(str(Path(folder) / "kernel.mlxfn"), call_kernel, *dispatch.inputs)
    match = re.search(r"```\n(.*)\n```", stdout.text(), re.DOTALL)
    assert match, "MLX printed no source"
    return match[1]


class _CapturedStdout:
    """Context manager that captures the writes to file descriptor 1, also from C++."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []

    def text(self) -> str:
        return b"".join(self._chunks).decode()

    def __enter__(self) -> "_CapturedStdout":
        self._read_end, self._write_end = os.pipe()
        self._original = os.dup(1)
        self._reader = threading.Thread(target=self._drain)
        self._reader.start()
        os.dup2(self._write_end, 1)
        return self

    def __exit__(self, *_: object) -> None:
        os.dup2(self._original, 1)
        os.close(self._write_end)
        os.close(self._original)
        self._reader.join()
        os.close(self._read_end)

    def _drain(self) -> None:
        while chunk := os.read(self._read_end, 65536):
            self._chunks.append(chunk)
