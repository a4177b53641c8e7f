"""The run of a dispatch on the CPU, from the source that MLX generates for it."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_k2.kernels.dispatch import Dispatch, KernelText, TemplateValue
from tests.metal_cpu.generated import generated_source
from tests.metal_cpu.program import FORWARD, Mode, Program, RunReport, Schedule
from tests.metal_cpu.translate import Argument, kernel_arguments

Array = npt.NDArray[Any]


class Executed(NamedTuple):
    """Outputs of a dispatch, and the report of its run."""

    outputs: list[mx.array]
    report: RunReport
    buffer_names: tuple[str, ...]

    def bytes_loaded(self, *names: str) -> int:
        """Return the bytes loaded from these buffers. Counted only in Mode.BYTES."""
        return sum(t.loaded for n, t in zip(self.buffer_names, self.report.traffic, strict=True) if n in names)


class _Instance(NamedTuple):
    program: Program
    buffers: tuple[Argument, ...]


def execute(
    dispatch: Dispatch,
    *,
    mode: Mode = Mode.FAST,
    schedule: Schedule = FORWARD,
    files: Mapping[str, Path] | None = None,
) -> Executed:
    """Run a dispatch. An input named in `files` is read from that file; its array gives only shape and type."""
    files = files or {}
    instance = _instance(dispatch, mode)
    inputs = dict(zip(dispatch.text.inputs, dispatch.inputs, strict=True))
    first_output = len(instance.buffers) - len(dispatch.output_shapes)
    buffers: list[Array | Path] = []
    for number, argument in enumerate(instance.buffers):
        if number >= first_output:
            output = number - first_output
            buffers.append(np.empty(dispatch.output_shapes[output], _NUMPY[dispatch.output_dtypes[output]]))
        elif argument.name in files:
            buffers.append(files[argument.name])
        elif argument.name in inputs:
            buffers.append(to_numpy(inputs[argument.name]))
        else:
            buffers.append(_shape_argument(argument.name, inputs))
    outputs = frozenset(range(first_output, len(buffers)))
    results, report = instance.program(buffers, outputs, dispatch.grid, dispatch.threadgroup, schedule)
    arrays = [to_mlx(result, dtype) for result, dtype in zip(results, dispatch.output_dtypes, strict=True)]
    return Executed(arrays, report, tuple(a.name for a in instance.buffers))


def _instance(dispatch: Dispatch, mode: Mode) -> _Instance:
    # MLX's text depends on the inputs' types and on whether they are scalars or have fewer than 8 elements.
    kinds = tuple((a.dtype, a.ndim == 0, a.size < 8) for a in dispatch.inputs)
    return _cached_instance(
        _Key(dispatch, (dispatch.text, dispatch.template, kinds, dispatch.output_dtypes, mode)), mode
    )


class _Key:
    """Cache key that is equal for dispatches that compile to the same program."""

    def __init__(self, dispatch: Dispatch, identity: tuple[object, ...]) -> None:
        self.dispatch = dispatch
        self.identity = identity

    def __hash__(self) -> int:
        return hash(str(self.identity))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and str(other.identity) == str(self.identity)


@functools.cache
def _cached_instance(key: _Key, mode: Mode) -> _Instance:
    source = generated_source(key.dispatch)
    name = kernel_name(source)
    program = Program(source, name, template_arguments(source, name), mode=mode)
    buffers = [a for a in kernel_arguments(source, name) if a.attribute == "buffer"]
    buffers.sort(key=lambda a: a.number or 0)
    return _Instance(program, tuple(buffers))


def kernel_name(source: str) -> str:
    """Return MLX's name of the kernel in its generated source."""
    match = re.search(r"void (custom_kernel_\w+)\(", source)
    assert match
    return match[1]


def template_arguments(source: str, name: str) -> dict[str, str]:
    """Return the template arguments of the one instantiation that MLX requests, by parameter."""
    instance = re.search(rf"\ntemplate \[\[host_name.*?decltype\({name}<(.*?)>\)", source, re.DOTALL)
    parameters = re.search(rf"template <([^>]*)>\s*\[\[kernel\]\] void {name}", source)
    if not (instance and parameters):
        return {}
    names = [parameter.split()[-1] for parameter in parameters[1].split(",")]
    return dict(zip(names, [value.strip() for value in instance[1].split(",")], strict=True))


def _shape_argument(name: str, inputs: Mapping[str, mx.array]) -> Array:
    owner, kind = name.rsplit("_", 1)
    array = inputs[owner]
    if kind == "shape":
        return np.array(array.shape, np.int32)
    if kind == "ndim":
        return np.array([array.ndim], np.int32)
    assert kind == "strides", name
    return np.array([int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)], np.int64)


_NUMPY: dict[mx.Dtype, type[np.generic]] = {
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


def with_text(dispatch: Dispatch, source: str, header: str | None = None) -> Dispatch:
    """Return the same dispatch with another kernel text."""
    text = dispatch.text
    changed = KernelText(text.name, text.inputs, text.outputs, source, text.header if header is None else header)
    return dispatch._replace(text=changed)


__all__ = [
    "Executed",
    "TemplateValue",
    "execute",
    "kernel_name",
    "template_arguments",
    "to_mlx",
    "to_numpy",
    "with_text",
]
