"""Execution of a dispatch on the CPU, from the source that MLX generates for it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_k2.kernels.dispatch import Dispatch
from tests.metal_cpu.generated import generated_source
from tests.metal_cpu.program import FORWARD, Mode, Program, RunReport, Schedule
from tests.metal_cpu.translate import Argument, kernel_arguments

Array = npt.NDArray[Any]


class Executed(NamedTuple):
    """Outputs and report of an executed dispatch."""

    outputs: list[mx.array]
    report: RunReport
    buffer_names: tuple[str, ...]

    def bytes_loaded(self, *names: str) -> int:
        """Return the bytes that the kernel loaded from the buffers ``names``. Needs Mode.BYTES."""
        traffic = zip(self.buffer_names, self.report.traffic, strict=True)
        return sum(buffer.loaded for name, buffer in traffic if name in names)


class _CompiledKernel(NamedTuple):
    program: Program
    buffers: tuple[Argument, ...]


_compiled_kernels: dict[str, _CompiledKernel] = {}
"""Kernels that this process has compiled, by the mode and all that their source depends on."""


def execute(
    dispatch: Dispatch,
    *,
    mode: Mode = Mode.FAST,
    schedule: Schedule = FORWARD,
    files: Mapping[str, Path] | None = None,
) -> Executed:
    """Run a dispatch. An input named in `files` is read from its file; its array gives only shape and type."""
    files = files or {}
    kernel = _compile(dispatch, mode)
    inputs = dict(zip(dispatch.text.inputs, dispatch.inputs, strict=True))
    first_output = len(kernel.buffers) - len(dispatch.output_shapes)  # MLX puts the outputs last
    buffers: list[Array | Path] = []
    for number, argument in enumerate(kernel.buffers):
        if number >= first_output:
            output = number - first_output
            buffers.append(np.empty(dispatch.output_shapes[output], _NUMPY_TYPES[dispatch.output_dtypes[output]]))
        elif argument.name in files:
            buffers.append(files[argument.name])
        elif argument.name in inputs:
            buffers.append(to_numpy(inputs[argument.name]))
        else:
            buffers.append(_shape_argument(argument.name, inputs))
    outputs = frozenset(range(first_output, len(buffers)))
    results, report = kernel.program(buffers, outputs, dispatch.grid, dispatch.threadgroup, schedule)
    arrays = [to_mlx(result, dtype) for result, dtype in zip(results, dispatch.output_dtypes, strict=True)]
    return Executed(arrays, report, tuple(argument.name for argument in kernel.buffers))


def _compile(dispatch: Dispatch, mode: Mode) -> _CompiledKernel:
    # MLX's source depends on the inputs' types, and on whether they are scalars or have fewer than 8 elements.
    kinds = tuple((array.dtype, array.ndim == 0, array.size < 8) for array in dispatch.inputs)
    key = str((dispatch.text, dispatch.template, kinds, dispatch.output_dtypes, mode))
    if key not in _compiled_kernels:
        source = generated_source(dispatch)
        name = kernel_name(source)
        program = Program(source, name, template_arguments(source, name), mode=mode)
        buffers = [argument for argument in kernel_arguments(source, name) if argument.attribute == "buffer"]
        buffers.sort(key=lambda argument: argument.number or 0)
        _compiled_kernels[key] = _CompiledKernel(program, tuple(buffers))
    return _compiled_kernels[key]


def kernel_name(source: str) -> str:
    """Return the name that MLX gave the kernel in its generated source."""
    match = re.search(r"void (custom_kernel_\w+)\(", source)
    assert match
    return match[1]


def template_arguments(source: str, name: str) -> dict[str, str]:
    """Return the template arguments of the single instantiation in MLX's source, by parameter."""
    instance = re.search(rf"\ntemplate \[\[host_name.*?decltype\({name}<(.*?)>\)", source, re.DOTALL)
    parameters = re.search(rf"template <([^>]*)>\s*\[\[kernel\]\] void {name}", source)
    if not (instance and parameters):
        return {}
    names = [parameter.split()[-1] for parameter in parameters[1].split(",")]
    return dict(zip(names, [value.strip() for value in instance[1].split(",")], strict=True))


def _shape_argument(name: str, inputs: Mapping[str, mx.array]) -> Array:
    """Return the value of an argument INPUT_shape, INPUT_ndim or INPUT_strides, which MLX adds to a kernel."""
    owner, kind = name.rsplit("_", 1)
    array = inputs[owner]
    if kind == "shape":
        return np.array(array.shape, np.int32)
    if kind == "ndim":
        return np.array([array.ndim], np.int32)
    assert kind == "strides", name
    return np.array([int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)], np.int64)


_NUMPY_TYPES: dict[mx.Dtype, type[np.generic]] = {
    mx.float32: np.float32,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,
    mx.uint32: np.uint32,
    mx.int32: np.int32,
}


def to_numpy(array: mx.array) -> Array:
    """Return the array as numpy. bfloat16, which numpy lacks, becomes uint16 with the same bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def to_mlx(array: Array, dtype: mx.Dtype) -> mx.array:
    """Return the MLX array of a result of `to_numpy`."""
    return mx.array(array).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(array)


def with_body(dispatch: Dispatch, source: str) -> Dispatch:
    """Return the dispatch of a kernel with another body."""
    return dispatch._replace(text=dispatch.text._replace(source=source))
