"""Tests of the program's source: what each module may import, and how it starts Python modules."""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_k2

PACKAGE = Path(mlx_k2.__file__).parent

# Lowest first: a module imports from lower levels and its own package. Packages of one level never import each other.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("package_install",),
    ("errors", "bounded_read", "builtin", "http_reason", "json_text", "private_files", "token_mask"),
    ("config", "sampling", "text", "tools", "kernels"),
    ("scheduling", "cluster", "weights"),
    ("protocol", "model"),
    ("guard", "launch"),
    ("stage", "deployment"),
    ("coordinator", "doctor"),
    ("chat", "benchmark"),
    ("api", "server", "client"),
    ("cli",),
    ("__main__", "testing"),
)
LEVEL_OF = {package: level for level, packages in enumerate(LEVELS) for package in packages}
MAY_IMPORT_MLX = ("kernels", "model", "stage", "testing", "weights/reader.py")
HTTP_PACKAGES = ("starlette", "uvicorn", "h11", "prometheus_client")
MAY_IMPORT_IN_FUNCTIONS = "cli"
GUARD_FILES = (  # what runs in the process of a guard, which stage/__main__.py starts
    "stage/__init__.py",
    "stage/__main__.py",
    "guard/__init__.py",
    "guard/guard.py",
    "guard/watchdog.py",
)

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def package_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module or ""


def parse(module: Path) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text())


@functools.cache
def imports_of(module: Path) -> tuple[str, ...]:
    return tuple(imported_names(parse(module)))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_imports_only_from_its_own_package_and_lower_levels(module: Path) -> None:
    package = package_of(module)
    assert package in LEVEL_OF, f"{package} has no level: give it one here and in docs/dev/architecture.md"
    for name in imports_of(module):
        parts = name.split(".")
        if parts[0] == "mlx_k2" and len(parts) > 1 and parts[1] != package:
            assert LEVEL_OF[parts[1]] < LEVEL_OF[package], f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_listed_packages_import_mlx_or_packages_of_models(module: Path) -> None:
    allowed = str(module) in MAY_IMPORT_MLX or package_of(module) in MAY_IMPORT_MLX
    forbidden = [name for name in imports_of(module) if name.split(".")[0] in ("mlx", "mlx_lm", "transformers")]
    assert allowed or not forbidden


@pytest.mark.parametrize("module", [module for module in MODULES if package_of(module) != "server"], ids=str)
def test_only_the_server_imports_the_packages_of_an_http_server(module: Path) -> None:
    assert not [name for name in imports_of(module) if name.split(".")[0] in HTTP_PACKAGES]


@pytest.mark.parametrize(
    "module", [module for module in MODULES if package_of(module) != MAY_IMPORT_IN_FUNCTIONS], ids=str
)
def test_no_import_is_inside_a_function_or_for_type_checking_only(module: Path) -> None:
    tree = parse(module)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [name for function in functions for name in imported_names(function)]
    assert "TYPE_CHECKING" not in (PACKAGE / module).read_text()


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_python_modules_are_started_with_option_p_which_excludes_the_current_folder(module: Path) -> None:
    sequences = [node.elts for node in ast.walk(parse(module)) if isinstance(node, ast.Tuple | ast.List)]
    commands = [[item.value if isinstance(item, ast.Constant) else None for item in items] for items in sequences]
    module_starts = [command for command in commands if "-m" in command]
    assert all(command[command.index("-m") - 1] == "-P" for command in module_starts), module_starts


def test_the_imports_have_no_cycle() -> None:
    graph = {str(module): {name for name in imports_of(module) if name.startswith("mlx_k2.")} for module in MODULES}
    module_of = {
        "mlx_k2." + str(module).removesuffix(".py").removesuffix("/__init__").replace("/", "."): str(module)
        for module in MODULES
    }
    visited: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in visited:
            for name in graph[module] & module_of.keys():
                visit(module_of[name], (*path, module))
            visited.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", GUARD_FILES)
def test_the_guard_imports_only_the_standard_library_and_listed_modules(module: str) -> None:
    allowed = {
        "mlx_k2.errors",
        "mlx_k2.json_text.parse",
        "mlx_k2.protocol.framing",
        "mlx_k2.protocol.guard_messages",
        *(f"mlx_k2.{name.removesuffix('.py').replace('/', '.')}" for name in GUARD_FILES),
    }
    for name in imports_of(Path(module)):
        assert name in allowed or name.split(".")[0] in sys.stdlib_module_names, name
