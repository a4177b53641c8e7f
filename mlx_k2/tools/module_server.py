"""MCP server for the functions of one Python file, on stdin and stdout. Runs as a separate process.

The tools are the public functions that the file defines, or those that its ``__all__`` names. Types and defaults come
from the signature, the description from the docstring. A result that is not text is returned as JSON, an iterator as a
list. Output that the functions print goes to stderr. A function that cannot be served ends the start.
"""

import contextlib
import functools
import importlib.util
import inspect
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
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
        for name, function in functions.items():
            _add(server, name, function)
    except BaseException as error:  # noqa: BLE001 - a module can raise any exception, SystemExit too
        _exit_with_error(path, error)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    server.run()
    os._exit(0)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    sys.path.append(str(path.parent))  # last, so that no file there replaces a module of a package that we import
    spec.loader.exec_module(module)
    return module


def _tools(module: ModuleType) -> dict[str, Callable[..., Any]]:
    public = getattr(module, "__all__", None)
    names = [name for name in vars(module) if not name.startswith("_")] if public is None else public
    found = {name: getattr(module, name) for name in names}
    functions: dict[str, Callable[..., Any]] = {
        name: item
        for name, item in found.items()
        if inspect.isfunction(item) and (public is not None or item.__module__ == _MODULE)
    }
    if public is not None and (others := found.keys() - functions.keys()):
        raise ImportError(f"__all__ names {min(others)}, which is not a function")
    if not functions:
        raise ImportError("it defines no public function")
    return functions


def _add(server: MCPServer, name: str, function: Callable[..., Any]) -> None:
    """Add a function as a tool.

    Raises:
        UnusableFunction: it cannot be called with named arguments in JSON, or has more than one result.
    """
    try:
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise TypeError(f"the parameter {parameter} has no name that a model can give: name each parameter")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError("it is a generator: return a list")
        description = inspect.getdoc(function) or ""
        server.add_tool(_as_tool(function), name=name, description=description, structured_output=False)
    except Exception as error:
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnusableFunction(f"line {inspect.unwrap(function).__code__.co_firstlineno}: {name}: {problem}") from error


class UnusableFunction(Exception):
    """The error for a function that cannot be a tool; names its line and the function."""


def _as_tool(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` in the form that mcp calls: blocking code in a thread, exceptions as text for the model."""

    @functools.wraps(function)
    async def tool(**arguments: Any) -> str:
        try:
            if inspect.iscoroutinefunction(function):
                result = await function(**arguments)
            else:
                result = await anyio.to_thread.run_sync(functools.partial(function, **arguments))
            text = result if isinstance(result, str) else _json_text(result)
        except (anyio.get_cancelled_exc_class(), ToolError):
            raise
        except BaseException as error:  # also KeyboardInterrupt and such, which would leave the call without a result
            raise ToolError(_well_formed(f"{type(error).__name__}: {error}")) from error
        return _well_formed(text)

    return tool


def _json_text(value: Any) -> str:
    try:
        return msgspec.json.encode(value, enc_hook=_as_json).decode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(msgspec.to_builtins(value, enc_hook=_as_json), ensure_ascii=False)


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, Iterator) else str(value)


def _well_formed(text: str) -> str:
    """Return ``text`` with U+FFFD for each half of a surrogate pair, as names of files can have."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _exit_with_error(path: Path, error: BaseException) -> NoReturn:
    """End the process with exit code 2 and one line on stderr that names the error and its line."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"line {lines[-1]}: " if lines else ""
    kind = "" if isinstance(error, UnusableFunction) else f"{type(error).__name__}: "
    sys.stderr.write(f"{where}{kind}{error}\n")
    sys.stderr.flush()
    os._exit(2)


def _end_with(parent: int) -> None:
    """End the process when ``parent`` has ended: a hanging function keeps the server from detecting a closed stdin."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
