"""Translation of Metal source to C++ for a host compiler, by a few textual rewrites. Knows no kernel."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

RUNTIME = Path(__file__).parent / "runtime"
STAND_INS = RUNTIME / "include"  # replace the few MLX headers that use Apple's own intrinsics
MLX_HEADERS = Path(mx.__file__).parent / "include"  # the wheel ships MLX's Metal headers, on Linux too

_UINT3_ATTRIBUTES = {
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_grid",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "dispatch_threads_per_threadgroup",
    "grid_size",
    "grid_origin",
}


class Argument(NamedTuple):
    """One argument of a kernel: `type name [[attribute(index)]]`. The type is without its address space."""

    type: str
    name: str
    attribute: str
    number: int | None  # the index of a buffer


def expand_includes(text: str) -> str:
    """Replace each `#include "..."` by our stand-in or MLX's header, once each, and drop system headers."""
    return _expand(text, set())


def _expand(text: str, seen: set[Path]) -> str:
    def replacement(match: re.Match[str]) -> str:
        for root in (STAND_INS, MLX_HEADERS):
            path = root / match[1]
            if path.exists():
                if path in seen:
                    return ""
                seen.add(path)
                return f'\n#line 1 "{match[1]}"\n' + _expand(path.read_text().replace("#pragma once", ""), seen) + "\n"
        raise FileNotFoundError(match[1])

    text = re.sub(r"^[ \t]*#include\s+<[^>]+>[^\n]*", "", text, flags=re.MULTILINE)
    return re.sub(r'^[ \t]*#include\s+"([^"]+)"[^\n]*', replacement, text, flags=re.MULTILINE)


def to_cpp(source: str) -> str:
    """Return Metal source, with includes expanded, as C++20 against runtime/include/metal_cpu.h."""
    source = re.sub(r"\[\[threadgroup\(\d+\)\]\]", "", source)
    source = re.sub(r"^template \[\[host_name\(.*?;\n", "", source, flags=re.MULTILINE | re.DOTALL)
    source = re.sub(  # threadgroup T name[N]; -> an array that the executor owns, one for each threadgroup
        r"^([ \t]*)threadgroup\s+((?:[\w:]+)(?:<[^;()=]*?>)?)\s+(\w+)\s*((?:\[[^;]*?\])*)\s*;",
        r"\1typedef \2 \3_array\4; CPU_THREADGROUP(\3, \3_array);",
        source,
        flags=re.MULTILINE,
    )
    source = re.sub(r"(\d\.?\d*)h\b", r"half(\1)", source)
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
    for part in _split_at_commas(text):
        pieces = re.match(r"\s*(.*?)\s*(\w+)\s*(?:\[\[(\w+)(?:\((\d+)\))?\]\])?\s*$", part, re.DOTALL)
        assert pieces, part
        kind, name, attribute, index = pieces.groups()
        kind = " ".join(re.sub(r"\b(device|constant|threadgroup|thread)\b", " ", kind).split())
        if attribute is None:  # Metal numbers unmarked buffers in their order
            attribute, index = "buffer", str(sum(a.attribute == "buffer" for a in arguments))
        arguments.append(Argument(kind, name, attribute, None if index is None else int(index)))
    return arguments


def _split_at_commas(text: str) -> list[str]:
    parts, depth = [""], 0
    for char in text:
        depth += {"(": 1, "<": 1, "[": 1, ")": -1, ">": -1, "]": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def entry_point(source: str, kernel: str, template: dict[str, str]) -> str:
    """Return C++ that calls one instantiation of the kernel with the executor's buffers and attributes."""
    values: list[str] = []
    for argument in kernel_arguments(source, kernel):
        kind = argument.type
        for name, value in template.items():
            kind = re.sub(rf"\b{name}\b", value, kind)
        base = kind.rstrip("&* ").strip()
        if argument.attribute == "buffer":
            pointer = f"({base}*)buffers[{argument.number}]"
            values.append(f"*{pointer}" if kind.endswith("&") else pointer)
        elif argument.attribute in _UINT3_ATTRIBUTES:
            part = {"uint3": "", "uint": ".x"}[base]
            values.append(f"cpu_uint3(attributes.{argument.attribute}){part}")
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
    """Return the C++ of one kernel: library, MLX's headers, the kernel and its entry point.

    `headers` name the MLX headers that precede `source`, unless `source` is already complete. `constants` are
    assignments to function constants.
    """
    includes = "".join(f'#include "mlx/backend/metal/kernels/{name}"\n' for name in ("utils.h", *headers))
    body = expand_includes(includes + '#line 1 "kernel"\n' + source)
    return (
        '#include "include/metal_cpu.h"\nusing namespace metal;\n'
        + to_cpp(body)
        + entry_point(body, kernel, template)
        + f"void set_function_constants() {{ {constants} }}\n"
    )
