"""Descriptions of tool servers: read from an MCP file, or made for a module of Python functions. Starts none."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from mlx_k2.errors import ToolsError
from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import convert, read_json

_VARIABLE = re.compile(r"\$\{(?:env:)?(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\}")
# Variables that other programs replace: ${input:key} and ${workspaceFolder:x}, {env:NAME}, Windows' %NAME%, and the
# shell's $NAME at the end of a text. A %NAME% has 3 letters or more: %E4% can be part of a URL.
_UNSUPPORTED_VARIABLE = re.compile(
    r"\$\{(?!(?:env:)?[A-Za-z_]\w*(?::-|\}))[^}]*\}|(?<!\$)\{env:\w+\}|%[A-Z_][A-Z0-9_]{2,}%|(?<!\S)\$[A-Z_][A-Z0-9_]*$"
)
_EXAMPLE = 'for instance {"mcpServers": {"files": {"command": "npx", "args": ["some-server"]}}}'


class StdioServer(msgspec.Struct, frozen=True, kw_only=True):
    """A server to start as a separate process. Its environment is ``env``, and our PATH, HOME and similar variables."""

    name: str
    command: str
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    cwd: str | None = None


class HttpServer(msgspec.Struct, frozen=True, kw_only=True):
    """A server that already runs, with the URL of its streamable HTTP endpoint."""

    name: str
    url: str
    headers: dict[str, str] = {}


Server: TypeAlias = StdioServer | HttpServer


class _ServerEntry(msgspec.Struct, frozen=True):
    """A server in an MCP file. Keys of other programs are ignored."""

    command: str | None = None
    args: tuple[str | int, ...] = ()
    env: dict[str, str | int] = {}
    cwd: str | None = None
    url: str | None = None
    http_url: str | None = msgspec.field(name="httpUrl", default=None)
    server_url: str | None = msgspec.field(name="serverUrl", default=None)
    headers: dict[str, str | int] = {}
    type: str | None = None
    disabled: bool = False


class _McpFile(msgspec.Struct, frozen=True):
    """The servers under ``mcpServers``; VS Code calls them ``servers``."""

    mcp_servers: dict[str, Any] | None = msgspec.field(name="mcpServers", default=None)
    servers: dict[str, Any] | None = None


def read_mcp_file(path: Path, environment: Mapping[str, str], notify: Callable[[str], None]) -> tuple[Server, ...]:
    """Return the enabled servers of an MCP file; ``${NAME}`` is replaced by its value in ``environment``.

    Comments, and commas before a closing bracket, are accepted. ``${env:NAME}`` is the same as ``${NAME}``. A malformed
    server is left out, and ``notify`` is called with its problem.

    Raises:
        ToolsError: the file cannot be read, or has a malformed server and no usable one; names the first problem.
    """
    try:
        file = read_json(path.read_bytes(), _McpFile, allow_comments=True)
    except OSError as error:
        raise ToolsError(f"{path} cannot be read: {error.strerror}") from None
    except JsonError as error:
        raise ToolsError(f"{path} is not an MCP file: {error}; {_EXAMPLE}") from None
    entries = file.servers if file.mcp_servers is None else file.mcp_servers
    if entries is None:
        raise ToolsError(f"{path} is not an MCP file: it has no mcpServers; {_EXAMPLE}")
    servers: list[Server] = []
    problems: list[str] = []
    for name, fields in entries.items():
        where = f"{path}: the server {name!r}"
        try:
            set_fields = fields  # null is the same as an absent key
            if isinstance(fields, dict):
                set_fields = {key: value for key, value in fields.items() if value is not None}
            entry = convert(set_fields, _ServerEntry)
            if not entry.disabled:
                servers.append(_server(name, entry, where, environment))
        except JsonError as error:
            problems.append(f"{where}: {error}")
        except ToolsError as error:
            problems.append(str(error))
    if problems and not servers:
        raise ToolsError(problems[0])
    for problem in problems:
        notify(problem)
    return tuple(servers)


def python_module(path: Path, environment: Mapping[str, str]) -> StdioServer:
    """Return the server for the functions of a Python file: a separate process with ``environment``.

    With -P it does not import from the current folder.

    Raises:
        ToolsError: there is no such file.
    """
    if not path.is_file():
        raise ToolsError(f"there is no Python file {path}")
    arguments = ("-P", "-m", "mlx_k2.tools.module_server", str(path.resolve()))
    return StdioServer(name=path.name, command=sys.executable, args=arguments, env=dict(environment))


def _server(name: str, entry: _ServerEntry, where: str, environment: Mapping[str, str]) -> Server:
    url = entry.url or entry.http_url or entry.server_url
    if (entry.command is None) == (url is None):
        raise ToolsError(f"{where} needs either a command or a url")
    if entry.type == "sse":
        raise ToolsError(f"{where} uses MCP's old HTTP+SSE: give the address of its streamable HTTP")
    fields = _replace_variables(msgspec.to_builtins(entry) | {"url": url}, where, environment)
    if entry.command is not None:
        return msgspec.convert(fields | {"name": name}, StdioServer)
    if not fields["url"].startswith(("http://", "https://")):
        raise ToolsError(f"{where} has the url {url!r}, which does not begin with http:// or https://")
    return msgspec.convert(fields | {"name": name}, HttpServer)


def _replace_variables(value: object, where: str, environment: Mapping[str, str]) -> Any:
    """Return ``value`` with ``${NAME}`` and ``${NAME:-default}`` in its texts replaced; numbers become text."""

    def value_of(match: re.Match[str]) -> str:
        text = environment.get(match["name"], match["default"])
        if text is None:
            raise ToolsError(f"{where} needs the environment variable {match['name']}, which is not set")
        return text

    match value:
        case str():
            if (unsupported := _UNSUPPORTED_VARIABLE.search(value)) is not None:
                problem = f"{unsupported[0]}, which is not replaced: write ${{NAME}} and set that variable"
                raise ToolsError(f"{where} has {problem}")
            return _VARIABLE.sub(value_of, value)
        case dict():
            return {key: _replace_variables(item, where, environment) for key, item in value.items()}
        case list() | tuple():
            return tuple(_replace_variables(item, where, environment) for item in value)
        case int():
            return str(value)
    return value
