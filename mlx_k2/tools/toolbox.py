"""The tools of several servers, for a program without an event loop: declarations, calls, start and end."""

import contextlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskStatus
from anyio.from_thread import BlockingPortal, start_blocking_portal
from mcp import MCPError, types
from mcp_types import INVALID_PARAMS, METHOD_NOT_FOUND

from mlx_k2.errors import ToolsError
from mlx_k2.tools.connection import Connection, NotStarted, ServerLost, first_problem
from mlx_k2.tools.outcome import Outcome, ToolResult
from mlx_k2.tools.servers import PythonFile, Server

_INVALID_IN_NAME = re.compile(r"[^\w.-]")
# Codes of the errors with which a server reports that it has not run a call.
_NOT_RUN_CODES = (INVALID_PARAMS, METHOD_NOT_FOUND)


@dataclass(frozen=True)
class Limits:
    """The limits of a tool server: seconds of its start, seconds per call, characters per result."""

    start_timeout_s: float = 60.0
    call_timeout_s: float = 120.0
    max_result_chars: int = 50_000


@dataclass(frozen=True)
class Tool:
    """A tool as it is declared to the model, and the connection for its calls."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """The JSON schema of the arguments."""
    connection: Connection
    name_on_server: str

    @property
    def server(self) -> str:
        """The name of the tool's server."""
        return self.connection.server.name

    @property
    def declaration(self) -> dict[str, Any]:
        """The tool in OpenAI's format."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolBox:
    """Tools that any thread can call, several at the same time. Every call gets a result, even if its server fails."""

    _portal: BlockingPortal
    tools: Mapping[str, Tool]
    """The tools by name."""
    _limits: Limits
    problems: Sequence[str] = ()
    """Lines for the user about servers that did not start, and tools that cannot be used."""

    @property
    def declarations(self) -> list[dict[str, Any]]:
        """All tools in OpenAI's format."""
        return [tool.declaration for tool in self.tools.values()]

    def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Run a call, and return its result when it has ended."""
        return self.start(name, arguments).result()

    def start(self, name: str, arguments: Mapping[str, Any]) -> Future[ToolResult]:
        """Start a call; return the future of its result. Its ``cancel`` asks the server to stop the call."""
        return self._portal.start_task_soon(self._call, name, dict(arguments))

    async def _call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        if name not in self.tools:
            names = ", ".join(self.tools) or "none"
            return ToolResult(Outcome.REFUSED, f"There is no tool {name!r}. The tools are: {names}.")
        tool = self.tools[name]
        server, timeout_s = tool.server, self._limits.call_timeout_s
        try:
            with anyio.fail_after(timeout_s):
                result = await tool.connection.call(tool.name_on_server, arguments)
        except TimeoutError:
            stray_line = tool.connection.last_stray_line
            hint = f" On its stdout it wrote {stray_line}, which is not a message." if stray_line else ""
            return ToolResult(
                Outcome.TIMED_OUT,
                f"The tool server {server} did not answer within {timeout_s:g} s; the call was ended.{hint}",
            )
        except NotStarted as lost:
            return ToolResult(Outcome.LOST, f"The call was not run: its tool server cannot be started: {lost}.")
        except ServerLost as lost:
            return ToolResult(
                Outcome.LOST, f"The tool server {server} was lost during this call, which may have run: {lost}."
            )
        except MCPError as error:
            may_have_run = error.code not in _NOT_RUN_CODES
            reaction = "ended the call, which may have run" if may_have_run else "did not accept the call"
            return ToolResult(Outcome.FAILED, f"The tool server {server} {reaction}: {error}")
        except Exception as error:  # noqa: BLE001 - any error of a server becomes a result for the model
            return ToolResult(
                Outcome.FAILED,
                f"The call was run, but the answer of the tool server {server} cannot be read: {first_problem(error)}",
            )
        return read_result(result, self._limits.max_result_chars)


@contextlib.contextmanager
def open_toolbox(servers: Sequence[Server], limits: Limits) -> Iterator[ToolBox]:
    """Start ``servers`` and yield their tools. On exit, end the calls that still run and close all servers.

    A server that does not start adds a line to ``problems``, and the tools of the others are used.

    Raises:
        ToolsError: no server starts, or two servers have the same name; names them.
    """
    counts = Counter(server.name for server in servers)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise ToolsError(f"two tool servers have the name {repeated[0]!r}: rename one")
    with start_blocking_portal(name="tools") as portal:
        try:
            _, connections = portal.start_task(_run_connections, servers, limits.start_timeout_s)
            offered_tools, problems = portal.call(_start_servers, connections)
            yield ToolBox(portal, _with_unique_names(offered_tools), limits, problems)
        finally:
            portal.call(portal.stop, True)


async def _run_connections(
    servers: Sequence[Server], start_timeout_s: float, *, task_status: TaskStatus[list[Connection]]
) -> None:
    """Make the connections, and run their tasks until this task is cancelled."""
    async with anyio.create_task_group() as tasks:
        task_status.started([Connection(server, tasks, start_timeout_s) for server in servers])
        await anyio.sleep_forever()


async def _start_servers(connections: Sequence[Connection]) -> tuple[list[tuple[Connection, types.Tool]], list[str]]:
    """Start all servers; return their tools in the order of the servers, and lines about problems."""
    tools: dict[str, list[types.Tool]] = {}
    problems: dict[str, list[str]] = {}

    async def list_tools(connection: Connection) -> None:
        name = connection.server.name
        try:
            tools[name], own_problems = await connection.tools()
            problems[name] = [f"{name}: {problem}" for problem in own_problems]
        except NotStarted as lost:
            problems[name] = [str(lost)]

    async with anyio.create_task_group() as group:
        for connection in connections:
            group.start_soon(list_tools, connection)
    names = [connection.server.name for connection in connections]
    lines = [problem for name in names for problem in problems[name]]
    if connections and not tools:
        has_only_files = all(isinstance(connection.server, PythonFile) for connection in connections)
        raise ToolsError(f"{'' if has_only_files else 'no tool server starts: '}{'; '.join(lines)}")
    return [(connection, tool) for connection in connections for tool in tools.get(connection.server.name, ())], lines


def _with_unique_names(offered_tools: Sequence[tuple[Connection, types.Tool]]) -> dict[str, Tool]:
    """Return the tools by unique names that can be part of a call's id.

    A name that occurs twice gets its server's name as prefix, and a number if it is still not unique.
    """
    counts = Counter(_valid_name(tool.name) for _, tool in offered_tools)
    tools: dict[str, Tool] = {}
    for connection, tool in offered_tools:
        base_name = _valid_name(tool.name)
        if counts[base_name] > 1:
            base_name = f"{_valid_name(connection.server.name)}_{base_name}"
        name = base_name
        number = 2
        while name in tools:
            name, number = f"{base_name}_{number}", number + 1
        tools[name] = Tool(name, tool.description or "", tool.input_schema, connection, tool.name)
    return tools


def _valid_name(name: str) -> str:
    return _INVALID_IN_NAME.sub("_", unicodedata.normalize("NFC", name)) or "_"


def read_result(result: types.CallToolResult, max_chars: int) -> ToolResult:
    """Return the result as text: its text parts, and a line about each other part.

    Text of more than ``max_chars`` characters is cut, with a line about it. A result without parts becomes its
    structured content as JSON.
    """
    text = "\n".join(map(_part_text, result.content))
    if not result.content and result.structured_content is not None:
        text = msgspec.json.encode(result.structured_content).decode()
    outcome = Outcome.FAILED if result.is_error else Outcome.DONE
    if len(text) <= max_chars:
        return ToolResult(outcome, text)
    suffix = f"\n[cut here: these are the first {max_chars} of {len(text)} characters]"
    return ToolResult(Outcome.FAILED if result.is_error else Outcome.CUT, text[:max_chars] + suffix)


def _part_text(part: types.ContentBlock) -> str:
    match part:
        case types.TextContent():
            return part.text
        case types.EmbeddedResource(resource=types.TextResourceContents() as resource):
            return resource.text
        case types.EmbeddedResource(resource=resource):
            return f"[not shown: {resource.uri}, {resource.mime_type or 'binary'}]"
        case types.ResourceLink():
            return f"[{part.name}: {part.uri}]"
    return f"[not shown: {part.mime_type}, {len(part.data)} characters of base64]"
