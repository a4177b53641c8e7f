"""The program of an MCP server for the functions of one Python file, on stdin and stdout.

The tools are the public functions that the file defines, or those that its ``__all__`` names. Types and defaults come
from the signature, the description from the docstring. A result that is not text is returned as JSON, an iterator as a
list. Output that the functions print goes to stderr. The server does not start if a function cannot be a tool.
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

_MODULE_NAME = "mlx_k2_tools_module"
_PARENT_CHECK_INTERVAL_S = 1.0
_IMPORT_TIMEOUT_S = 30.0
_MAX_REASON_CHARS = 400


def main(path: Path) -> None:
    """Serve until stdin ends, then end the process at once, even if a function still runs."""
    server = MCPServer(path.name, log_level="ERROR")
    slow_import = threading.Timer(_IMPORT_TIMEOUT_S, _exit_in_import, (path, threading.get_ident()))
    slow_import.daemon = True
    slow_import.start()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            functions = _tool_functions(_load_module(path))
        for name, function in functions.items():
            _add_tool(server, name, function)
    except BaseException as error:  # noqa: BLE001 - a module can raise any exception, SystemExit too
        _exit_with_error(path, error)
    finally:
        slow_import.cancel()
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    server.run()
    os._exit(0)


def _load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_MODULE_NAME, path)
    if spec is None or spec.loader is None:
        raise UnusableFile("it is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE_NAME] = module
    sys.path.append(str(path.parent))  # last, so that no file there shadows a module of a package
    spec.loader.exec_module(module)
    return module


def _tool_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Return the functions that become tools, by name; raise UnusableFile for none, or if ``__all__`` has others."""
    public_names = getattr(module, "__all__", None)
    functions: dict[str, Callable[..., Any]]
    if public_names is None:
        functions = {
            name: item
            for name, item in vars(module).items()
            if not name.startswith("_") and inspect.isfunction(item) and item.__module__ == _MODULE_NAME
        }
    else:
        functions = {name: getattr(module, name) for name in public_names}
        for name, item in functions.items():
            if not inspect.isfunction(item):
                raise UnusableFile(f"__all__ names {name}, which is not a function")
    if not functions:
        raise UnusableFile("it defines no public function")
    return functions


def _add_tool(server: MCPServer, name: str, function: Callable[..., Any]) -> None:
    """Add a function as a tool.

    Raises:
        UnusableFile: the function cannot be called with named JSON arguments, or is a generator.
    """
    try:
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise TypeError(f"the parameter {parameter} has no name that a model can give: name each parameter")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError("it is a generator: return a list")
        description = inspect.getdoc(function) or ""
        server.add_tool(_tool_for(function), name=name, description=description, structured_output=False)
    except Exception as error:
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnusableFile(f"{name}: {problem}", inspect.unwrap(function).__code__.co_firstlineno) from error


class UnusableFile(Exception):
    """The error for a file without usable functions: the reason, and the line of the file if one is the cause."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def _tool_for(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a coroutine function that calls ``function``: blocking code in a thread, exceptions as ToolError."""

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
        except BaseException as error:  # also SystemExit and others, after which the call would get no result
            raise ToolError(_well_formed(f"{type(error).__name__}: {error}")) from error
        return _well_formed(text)

    return tool


def _json_text(value: Any) -> str:
    try:
        return msgspec.json.encode(value, enc_hook=_json_value).decode()
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(msgspec.to_builtins(value, enc_hook=_json_value), ensure_ascii=False)


def _json_value(value: Any) -> Any:
    """Return a value of a type that msgspec does not know as a list or as text."""
    return list(value) if isinstance(value, Iterator) else str(value)


def _well_formed(text: str) -> str:
    """Return ``text`` with U+FFFD for each lone surrogate; names of files can have some."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _exit_with_error(path: Path, error: BaseException) -> NoReturn:
    match error:
        case UnusableFile():
            line, reason = error.line, str(error)
        case SyntaxError() if error.filename == str(path):
            line, reason = error.lineno, error.msg
        case _:
            line = _last_line(path, traceback.extract_tb(error.__traceback__))
            reason = f"{type(error).__name__}: {error}"
    _exit_with_reason(path, line, reason)


def _exit_in_import(path: Path, thread_id: int) -> None:
    """End the process, whose thread ``thread_id`` has not imported the file in time."""
    line = _last_line(path, traceback.extract_stack(sys._current_frames()[thread_id]))
    _exit_with_reason(path, line, f"the import of the file did not end within {_IMPORT_TIMEOUT_S:g} s")


def _last_line(path: Path, frames: traceback.StackSummary) -> int | None:
    """Return the line of the innermost frame in the file; None if no frame is."""
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return lines[-1] if lines else None


def _exit_with_reason(path: Path, line: int | None, reason: str) -> NoReturn:
    """End the process with exit code 2 and one line on stderr that names the file, the line and the reason."""
    where = path.name if line is None else f"{path.name}, line {line}"
    sys.stderr.write(f"{where}: {' '.join(reason.split())[:_MAX_REASON_CHARS]}\n")
    sys.stderr.flush()
    os._exit(2)


def _exit_with_parent(parent_pid: int) -> None:
    """End the process when its parent has ended: a hanging function keeps the server from detecting a closed stdin."""
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_CHECK_INTERVAL_S)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
