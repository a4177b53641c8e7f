"""Check of generated Metal source with clang's C++14 front end (package libclang) and a few lints. Nothing is run."""

import importlib
import re

import pytest

from tests.metal_cpu.translate import RUNTIME

FLAGS = (
    "-std=c++14",
    "-xc++",
    "-ffreestanding",
    "-nostdinc",
    "-nostdinc++",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wall",
    "-Wshadow",
    "-Wconditional-uninitialized",
    "-Wno-unknown-attributes",
    "-Wno-ignored-attributes",
    "-Wno-unused",
    "-Werror",
    f"-I{RUNTIME}",
)
_TYPES = "uint4|uint2|uint|float4|float|half|bfloat|T|int|ushort|uint32_t|int32_t|bfloat16_t"


def type_errors(source: str) -> list[str]:
    """Return the errors that clang and the lints find in a kernel's generated source."""
    return [*_clang_errors(source), *_lint_errors(source)]


def _clang_errors(source: str) -> list[str]:
    try:
        cindex = importlib.import_module("clang.cindex")
    except ImportError:
        pytest.skip("needs libclang: pip install libclang")
    # The instantiation and the attributes become plain C++. clang allows an address space on a static variable only.
    text = re.sub(r"^template \[\[host_name\(.*?\)\]\] \[\[kernel\]\]", "template", source, flags=re.MULTILINE)
    text = re.sub(r"\[\[(?:kernel|buffer\(\d+\)|\w+)\]\]", "", text)
    text = re.sub(
        r"^([ \t]*)threadgroup\s+([\w:<>, ]+?\s+\w+\s*\[)", r"\1static threadgroup \2", text, flags=re.MULTILINE
    )
    text = '#include "typecheck.h"\n#line 1 "kernel"\n' + text
    unit = cindex.Index.create().parse("kernel.cpp", args=list(FLAGS), unsaved_files=[("kernel.cpp", text)])
    errors = [diagnostic for diagnostic in unit.diagnostics if diagnostic.severity >= cindex.Diagnostic.Error]
    return [f"line {error.location.line}: {error.spelling}" for error in errors]


def _lint_errors(source: str) -> list[str]:
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    lines = []
    for number, line in enumerate(code.split("\n"), 1):
        if re.search(r"\bdouble\b", line):
            lines.append(f"line {number}: Metal has no double")
        if re.search(r"(?<![\w.])\d+\.\d*(?:[eE][-+]?\d+)?(?![\w.])", line):
            lines.append(f"line {number}: a double literal (no f)")
        # a declaration with nothing but const before its type
        prefixes = (line[: match.start()].rstrip() for match in re.finditer(rf"\b(?:{_TYPES})\s*\*\s*\w", line))
        if any(re.search(r"(?:^|[=(,;{])\s*(?:const)?$", prefix) for prefix in prefixes):
            lines.append(f"line {number}: a pointer without address space")
        if re.search(r"\b(?:new|delete|virtual|try|catch|goto|dynamic_cast|std::)\b", line):
            lines.append(f"line {number}: not in Metal")
    return lines
