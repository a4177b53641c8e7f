"""Compilation of a kernel body for CUDA with NVRTC from PyPI. It needs no GPU, and the result is not run."""

import ctypes
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import pytest

from mlx_k2.kernels.dispatch import Dispatch, cuda_body, cuda_header

ARCHITECTURE = "sm_90"


class CudaCost(NamedTuple):
    """Costs of one kernel, from the assembler's report and the generated code.

    ``converts`` is the number of conversions from integer to float.
    """

    registers: int
    spilled_bytes: int
    loads_of_16_bytes: int
    converts: int
    fmas: int


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(f"nvidia.{name}") if importlib.util.find_spec("nvidia") else None
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs NVRTC: pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12 (Linux)")
    return Path(next(iter(spec.submodule_search_locations)))


def cuda_source(dispatch: Dispatch) -> str:
    """Return source as MLX's cuda_kernel generates it: header, arguments, constants, body."""
    types = {mx.float32: "float", mx.bfloat16: "__nv_bfloat16", mx.uint32: "uint32_t", mx.int32: "int32_t"}
    arguments = []
    for name, array in zip(dispatch.text.inputs, dispatch.inputs, strict=True):
        arguments.append(f"const {types[array.dtype]}* {name}")
        if f"{name}_shape" in dispatch.text.source:
            arguments.append(f"const __grid_constant__ Shape {name}_shape")
    outputs = zip(dispatch.text.outputs, dispatch.output_dtypes, strict=True)
    arguments += [f"{types[dtype]}* {name}" for name, dtype in outputs]
    constants = [
        f"using {name} = {types[value]};" if isinstance(value, mx.Dtype) else f"constexpr int {name} = {int(value)};"
        for name, value in dispatch.template
    ]
    return "\n".join(
        [
            "#include <cuda_bf16.h>",
            "typedef unsigned int uint32_t; typedef int int32_t;",
            "struct Shape { int values[8]; __device__ int operator[](int i) const { return values[i]; } };",
            cuda_header(dispatch.text),
            "namespace mlx::core::cu {",
            f'extern "C" __global__ void {dispatch.text.name}({", ".join(arguments)}) {{',
            *constants,
            cuda_body(dispatch.text.source),
            "}",
            "}",
        ]
    )


def compile_cuda(source: str) -> CudaCost:
    """Return the costs of ``source``. Raise AssertionError with the compiler's log if it is not valid CUDA."""
    library = ctypes.CDLL(str(next((_package_folder("cuda_nvrtc") / "lib").glob("libnvrtc.so*"))))
    include = _package_folder("cuda_runtime") / "include"
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    options = [f"--gpu-architecture={ARCHITECTURE}", f"-I{include}", "-std=c++17", "--ptxas-options=-v"]
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = library.nvrtcCompileProgram(program, len(options), encoded)

    def read_text(name: str) -> str:
        size = ctypes.c_size_t()
        getattr(library, f"nvrtcGet{name}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{name}")(program, buffer)
        return buffer.value.decode()

    log = read_text("ProgramLog")
    assert not failed, log
    ptx = read_text("PTX")
    registers = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores", log)
    assert registers and spilled, log
    return CudaCost(
        registers=int(registers[1]),
        spilled_bytes=int(spilled[1]),
        loads_of_16_bytes=len(re.findall(r"ld\.global(?:\.nc)?\.v4\.u32", ptx)),
        converts=len(re.findall(r"cvt\.rn\.f32\.[us]\d+", ptx)),
        fmas=len(re.findall(r"fma\.rn\.f32", ptx)),
    )
