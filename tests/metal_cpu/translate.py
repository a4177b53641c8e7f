"""Translation of a Metal kernel to C++ for a host compiler, by a few textual replacements."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

RUNTIME = Path(__file__).parent / "runtime"
STAND_INS = RUNTIME / "include"
"""Folder of replacements for the MLX headers that use Apple's own intrinsics."""
MLX_HEADERS = Path(mx.__file__).parent / "include"
"""Folder of MLX's Metal headers, which the wheel has on Linux, too."""

_UINT3_ATTRIBUTES = {
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_grid",
    "threads_per_threadgroup",
}


class Argument(NamedTuple):
    """Argument of a kernel, `type name [[attribute(number)]]`. The type has no address space."""

    type: str
    name: str
    attribute: str
    number: int | None
    """The number in the attribute: the index of a buffer. None for attributes without a number."""


def expand_includes(text: str) -> str:
    """Replace each `#include "..."` by the text of our stand-in or of MLX's header, each header once.

    Includes of system headers are removed.
    """
    return _expand(text, set())


def _expand(text: str, included: set[Path]) -> str:
    def header_text(match: re.Match[str]) -> str:
        for root in (STAND_INS, MLX_HEADERS):
            path = root / match[1]
            if path.exists():
                if path in included:
                    return ""
                included.add(path)
                expanded = _expand(path.read_text().replace("#pragma once", ""), included)
                return f'\n#line 1 "{match[1]}"\n{expanded}\n'
        raise FileNotFoundError(match[1])

    text = re.sub(r"^[ \t]*#include\s+<[^>]+>[^\n]*", "", text, flags=re.MULTILINE)
    return re.sub(r'^[ \t]*#include\s+"([^"]+)"[^\n]*', header_text, text, flags=re.MULTILINE)


def to_cpp(source: str) -> str:
    """Translate Metal source with expanded includes to C++20 that uses runtime/include/metal_cpu.h."""
    source = re.sub(r"\[\[threadgroup\(\d+\)\]\]", "", source)
    # remove the instantiations: `entry_point` calls the one that is needed
    source = re.sub(r"^template \[\[host_name\(.*?;\n", "", source, flags=re.MULTILINE | re.DOTALL)
    source = re.sub(  # `threadgroup T name[N];` becomes a reference to memory of the executor
        r"^([ \t]*)threadgroup\s+((?:[\w:]+)(?:<[^;()=]*?>)?)\s+(\w+)\s*((?:\[[^;]*?\])*)\s*;",
        r"\1typedef \2 \3_array\4; CPU_THREADGROUP(\3, \3_array);",
        source,
        flags=re.MULTILINE,
    )
    source = re.sub(r"(\d\.?\d*)h\b", r"half(\1)", source)  # literals such as 1.0h
    return source.replace("[[kernel]]", "")


def kernel_arguments(source: str, kernel: str) -> list[Argument]:
    """Return the arguments of a kernel's function, in order."""
    match = re.search(rf"void\s+{re.escape(kernel)}\s*\(", source)
    assert match, f"no kernel {kernel}"
    depth, end = 1, match.end()
    while depth:
        depth += {"(": 1, ")": -1}.get(source[end], 0)
        end += 1
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", source[match.end() : end - 1], flags=re.DOTALL)
    arguments: list[Argument] = []
    for declaration in _split_at_commas(text):
        fields = re.match(r"\s*(.*?)\s*(\w+)\s*(?:\[\[(\w+)(?:\((\d+)\))?\]\])?\s*$", declaration, re.DOTALL)
        assert fields, declaration
        type_name, name, attribute, number = fields.groups()
        type_name = " ".join(re.sub(r"\b(device|constant|threadgroup|thread)\b", " ", type_name).split())
        if attribute is None:  # Metal numbers buffers without attribute in their order
            attribute, number = "buffer", str(sum(argument.attribute == "buffer" for argument in arguments))
        arguments.append(Argument(type_name, name, attribute, None if number is None else int(number)))
    return arguments


def _split_at_commas(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += {"(": 1, "<": 1, "[": 1, ")": -1, ">": -1, "]": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def entry_point(source: str, kernel: str, template: dict[str, str]) -> str:
    """Return C++ that calls an instantiation of the kernel with the executor's buffers and attributes."""
    values: list[str] = []
    for argument in kernel_arguments(source, kernel):
        type_name = argument.type
        for name, value in template.items():
            type_name = re.sub(rf"\b{name}\b", value, type_name)
        base_type = type_name.rstrip("&* ").strip()
        if argument.attribute == "buffer":
            pointer = f"({base_type}*)buffers[{argument.number}]"
            values.append(f"*{pointer}" if type_name.endswith("&") else pointer)
        elif argument.attribute in _UINT3_ATTRIBUTES:
            member = {"uint3": "", "uint": ".x"}[base_type]
            values.append(f"cpu_uint3(attributes.{argument.attribute}){member}")
        else:
            values.append(f"attributes.{argument.attribute}")
    instance = kernel + (f"<{', '.join(template.values())}>" if template else "")
    return (
        '\n#line 1 "entry point"\n'
        "static void call_kernel(const executor::Attributes& attributes, void** buffers) "
        f"{{ {instance}({', '.join(values)}); }}\n"
        "extern void (*const kernel_entry)(const executor::Attributes&, void**);\n"
        "void (*const kernel_entry)(const executor::Attributes&, void**) = call_kernel;\n"
    )


def whole_program(source: str, kernel: str, template: dict[str, str], headers: Sequence[str], constants: str) -> str:
    """Return the C++ of one kernel: our Metal library, MLX's headers, the kernel and its entry point.

    `headers` are the MLX headers that `source` needs in addition to utils.h. `constants` are assignments to function
    constants.
    """
    includes = "".join(f'#include "mlx/backend/metal/kernels/{name}"\n' for name in ("utils.h", *headers))
    body = expand_includes(includes + '#line 1 "kernel"\n' + source)
    return (
        '#include "include/metal_cpu.h"\nusing namespace metal;\n'
        + to_cpp(body)
        + entry_point(body, kernel, template)
        + f"void set_function_constants() {{ {constants} }}\n"
    )
