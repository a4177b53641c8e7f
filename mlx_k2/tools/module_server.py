"""MCP server for the functions of one Python file, on stdin and stdout. Runs as a process of its own.

The tools are the public functions that the file defines, or those that its ``__all__`` names. Name, types and defaults
come from the signature, the description from the docstring. A result that is not text is returned as JSON. Output that
the functions print goes to stderr.
"""

import contextlib
import functools
import importlib.util
import inspect
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import anyio.to_thread
import msgspec
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

_MODULE = "mlx_k2_tools_module"
_LOOK_EVERY_S = 1.0


def main(path: Path) -> None:
    """Serve until stdin ends, then end the process at once, even if a function still runs."""
    server = MCPServer(path.name, log_level="ERROR")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            functions = _tools(_load(path))
        for function in functions:
            server.add_tool(_as_tool(function), description=inspect.getdoc(function) or "", structured_output=False)
    except BaseException as error:  # noqa: BLE001 - a module can raise any exception, SystemExit too
        _give_up(path, error)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    server.run()
    os._exit(0)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    sys.path.append(str(path.parent))  # last, so that no file there replaces a module of a package that we import
    spec.loader.exec_module(module)
    return module


def _tools(module: ModuleType) -> list[Callable[..., Any]]:
    public = getattr(module, "__all__", None)
    names = vars(module) if public is None else public
    found = [getattr(module, name) for name in names if public is not None or not name.startswith("_")]
    functions: list[Callable[..., Any]] = [
        item for item in found if inspect.isfunction(item) and (public is not None or item.__module__ == _MODULE)
    ]
    if not functions:
        raise ImportError("it defines no public function")
    return functions


def _as_tool(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` in the form that mcp calls: blocking code in a thread, exceptions as text for the model."""

    def blocking(**arguments: Any) -> Any:
        try:
            return function(**arguments)
        except SystemExit as error:  # would end this thread without an answer to the call
            raise RuntimeError(f"SystemExit: {error}") from error

    @functools.wraps(function)
    async def tool(**arguments: Any) -> str:
        try:
            if inspect.iscoroutinefunction(function):
                result = await function(**arguments)
            else:
                result = await anyio.to_thread.run_sync(functools.partial(blocking, **arguments))
            return result if isinstance(result, str) else msgspec.json.encode(result, enc_hook=str).decode()
        except Exception as error:
            raise ToolError(f"{type(error).__name__}: {error}") from error

    return tool


def _give_up(path: Path, error: BaseException) -> NoReturn:
    """End the process with exit code 2 and one line on stderr that names the error and its line."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"line {lines[-1]}: " if lines else ""
    sys.stderr.write(f"{where}{type(error).__name__}: {error}\n")
    sys.stderr.flush()
    os._exit(2)


def _end_with(parent: int) -> None:
    """End the process when ``parent`` has ended: a hanging function keeps the server from detecting a closed stdin."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
