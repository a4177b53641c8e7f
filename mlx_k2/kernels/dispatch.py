"""One kernel call as a value: its text, inputs, template and grid. Knows no formula.

A wrapper decides a `Launch`; `run` performs it. So a test can take the very launch that a Mac would perform and run
its text elsewhere.
"""

import functools
import importlib.resources
import re
from collections.abc import Callable
from typing import NamedTuple, cast

import mlx.core as mx

TemplateValue = bool | int | mx.Dtype


class KernelText(NamedTuple):
    """A kernel before MLX has given it a signature. Inputs and outputs are named in the order of its arguments."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str


class Dispatch(NamedTuple):
    """Everything that `mx.fast.metal_kernel` is told for one call. grid and threadgroup count threads."""

    text: KernelText
    inputs: tuple[mx.array, ...]
    template: tuple[tuple[str, TemplateValue], ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[mx.Dtype, ...]


class CompiledKernel(NamedTuple):
    """What mlx returns for a text; called with keywords it gives the outputs, lazily."""

    call: Callable[..., list[mx.array]]


def read_metal(name: str) -> str:
    """The text of one .metal (or .h) file of this package."""
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def metal_texts() -> list[str]:
    """Every kernel text of this package, in the order of file names."""
    files = importlib.resources.files(__package__).iterdir()
    return [read_metal(name) for name in sorted(file.name for file in files) if name.endswith((".metal", ".h"))]


@functools.cache
def kernel_text(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], header: str | None) -> KernelText:
    """The kernel in NAME.metal, with the file `header` before it."""
    return KernelText(name, inputs, outputs, read_metal(f"{name}.metal"), read_metal(header) if header else "")


@functools.cache
def metal_kernel(text: KernelText) -> CompiledKernel:
    """MLX's kernel object for a text. Building it works everywhere; calling it needs Metal."""
    kernel = mx.fast.metal_kernel(
        name=f"k2_{text.name}",
        input_names=list(text.inputs),
        output_names=list(text.outputs),
        source=text.source,
        header=text.header,
    )
    return CompiledKernel(cast(Callable[..., list[mx.array]], kernel))


def cuda_body(source: str) -> str:
    """Metal source without the address spaces of its pointers and constants, which CUDA does not write."""
    return re.sub(r"\b(?:device|constant|thread)\s+", "", source)


def cuda_header(text: KernelText) -> str:
    """What goes before a body for CUDA: Metal's words, and the kernel's own header."""
    return read_metal("cuda.h") + cuda_body(text.header)


@functools.cache
def cuda_kernel(text: KernelText) -> CompiledKernel:
    """The same body for an NVIDIA GPU. Only kernels without simdgroup matrices."""
    kernel = mx.fast.cuda_kernel(
        name=f"k2_{text.name}",
        input_names=list(text.inputs),
        output_names=list(text.outputs),
        source=cuda_body(text.source),
        header=cuda_header(text),
    )
    return CompiledKernel(cast(Callable[..., list[mx.array]], kernel))


def run(dispatch: Dispatch) -> list[mx.array]:
    """The launch's outputs, lazily. Raises RuntimeError where MLX has neither Metal nor CUDA."""
    build = cuda_kernel if mx.cuda.is_available() else metal_kernel
    return build(dispatch.text).call(
        inputs=list(dispatch.inputs),
        template=list(dispatch.template) or None,
        grid=dispatch.grid,
        threadgroup=dispatch.threadgroup,
        output_shapes=list(dispatch.output_shapes),
        output_dtypes=list(dispatch.output_dtypes),
    )
