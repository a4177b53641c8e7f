"""One kernel call as a value: its text, inputs, template arguments and grid. Knows no particular kernel.

The functions for kernels return a `Dispatch`, and `run` executes it on a GPU. So a test can execute the text of the
same `Dispatch` on a CPU.
"""

import functools
import importlib.resources
import re
from collections.abc import Callable
from typing import NamedTuple, cast

import mlx.core as mx

TemplateValue = bool | int | mx.Dtype
Kernel = Callable[..., list[mx.array]]
"""A kernel object of MLX. It takes keyword arguments and returns the outputs lazily."""


class KernelText(NamedTuple):
    """A kernel's source, to which MLX adds the signature from the names of inputs and outputs, in their order."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str


class Dispatch(NamedTuple):
    """All arguments of one call of a `Kernel`. ``grid`` and ``threadgroup`` count threads."""

    text: KernelText
    inputs: tuple[mx.array, ...]
    template: tuple[tuple[str, TemplateValue], ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[mx.Dtype, ...]


def read_metal(name: str) -> str:
    """Return the text of one .metal or .h file of this package."""
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def metal_texts() -> list[str]:
    """Return the texts of all .metal and .h files of this package, in the order of file names."""
    files = importlib.resources.files(__package__).iterdir()
    return [read_metal(name) for name in sorted(file.name for file in files) if name.endswith((".metal", ".h"))]


@functools.cache
def kernel_text(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], header: str | None) -> KernelText:
    """Return the kernel in NAME.metal, with the text of the file ``header`` as its header."""
    return KernelText(name, inputs, outputs, read_metal(f"{name}.metal"), read_metal(header) if header else "")


@functools.cache
def metal_kernel(text: KernelText) -> Kernel:
    """Return MLX's kernel object of a text. It can be built on every machine; a call needs Metal."""
    return _build_kernel(mx.fast.metal_kernel, text)


def cuda_body(source: str) -> str:
    """Return Metal source without the address spaces of pointers and constants, which CUDA does not have."""
    return re.sub(r"\b(?:device|constant|thread)\s+", "", source)


def cuda_header(text: KernelText) -> str:
    """Return a kernel's header for CUDA: cuda.h, which defines Metal's names, and then the kernel's own header."""
    return read_metal("cuda.h") + cuda_body(text.header)


@functools.cache
def cuda_kernel(text: KernelText) -> Kernel:
    """Return MLX's kernel object of a text for an NVIDIA GPU. The text may use only names that cuda.h has."""
    return _build_kernel(mx.fast.cuda_kernel, text._replace(source=cuda_body(text.source), header=cuda_header(text)))


def _build_kernel(build: Callable[..., object], text: KernelText) -> Kernel:
    kernel = build(
        name=f"k2_{text.name}",
        input_names=list(text.inputs),
        output_names=list(text.outputs),
        source=text.source,
        header=text.header,
    )
    return cast(Kernel, kernel)


def run(dispatch: Dispatch) -> list[mx.array]:
    """Return the dispatch's outputs, lazily.

    Raises:
        RuntimeError: MLX has neither Metal nor CUDA.
    """
    kernel = cuda_kernel(dispatch.text) if mx.cuda.is_available() else metal_kernel(dispatch.text)
    return kernel(
        inputs=list(dispatch.inputs),
        template=list(dispatch.template) or None,
        grid=dispatch.grid,
        threadgroup=dispatch.threadgroup,
        output_shapes=list(dispatch.output_shapes),
        output_dtypes=list(dispatch.output_dtypes),
    )
