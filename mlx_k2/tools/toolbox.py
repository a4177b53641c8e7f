"""The tools of all servers together, for a program without an event loop. Declares, calls and closes them."""

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
from mlx_k2.tools.servers import Server

_NOT_IN_A_NAME = re.compile(r"[^\w.-]")
# Codes of errors with which a server reports that it has not run a call.
_NOT_RUN = (INVALID_PARAMS, METHOD_NOT_FOUND)


@dataclass(frozen=True)
class Limits:
    """The limits of a tool server: seconds to start, seconds per call, characters per result."""

    start_timeout_s: float = 60.0
    call_timeout_s: float = 120.0
    max_result_chars: int = 50_000


@dataclass(frozen=True)
class Tool:
    """A tool as it is declared to the model, and the target of its calls."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """The JSON schema of the arguments."""
    connection: Connection
    name_there: str
    """The tool's name on its server."""

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
    """Tools to call, several at once and from any thread. Every call gets a result, even if its server fails."""

    _portal: BlockingPortal
    tools: Mapping[str, Tool]
    """The tools by name."""
    _limits: Limits
    problems: Sequence[str] = ()
    """Lines for the user about servers that did not start, and tools that cannot be offered."""

    @property
    def declarations(self) -> list[dict[str, Any]]:
        """All tools in OpenAI's format."""
        return [tool.declaration for tool in self.tools.values()]

    def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Run one call to its end and return its result."""
        return self.start(name, arguments).result()

    def start(self, name: str, arguments: Mapping[str, Any]) -> Future[ToolResult]:
        """Start a call. Cancelling the future asks the server to stop it."""
        return self._portal.start_task_soon(self._call, name, dict(arguments))

    async def _call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        if name not in self.tools:
            known = ", ".join(self.tools) or "none"
            return ToolResult(Outcome.REFUSED, f"There is no tool {name!r}. The tools are: {known}.")
        tool = self.tools[name]
        server, timeout_s = tool.server, self._limits.call_timeout_s
        try:
            with anyio.fail_after(timeout_s):
                result = await tool.connection.call(tool.name_there, arguments)
        except TimeoutError:
            stray = tool.connection.stray
            wrote = f" On its stdout it wrote {stray}, which is not a message." if stray else ""
            return ToolResult(
                Outcome.TIMED_OUT,
                f"The tool server {server} did not answer within {timeout_s:g} s; the call was ended.{wrote}",
            )
        except NotStarted as lost:
            return ToolResult(
                Outcome.LOST, f"The call was not run: the tool server {server} cannot be started: {lost}."
            )
        except ServerLost as lost:
            return ToolResult(
                Outcome.LOST, f"The tool server {server} was lost during this call, which may have run: {lost}."
            )
        except MCPError as error:
            happened = "did not accept the call" if error.code in _NOT_RUN else "ended the call, which may have run"
            return ToolResult(Outcome.FAILED, f"The tool server {server} {happened}: {error}")
        except Exception as error:  # noqa: BLE001 - any error of a server becomes a result for the model
            return ToolResult(
                Outcome.FAILED,
                f"The call was run, but the answer of the tool server {server} cannot be read: {first_problem(error)}",
            )
        return read_result(result, self._limits.max_result_chars)


@contextlib.contextmanager
def open_toolbox(servers: Sequence[Server], limits: Limits) -> Iterator[ToolBox]:
    """Start ``servers`` and yield their tools. On exit, end the calls that still run and close all servers.

    A server that does not start is a problem of the toolbox, and the others are used.

    Raises:
        ToolsError: no server starts, or two servers have one name; names the servers.
    """
    twice = [name for name, count in Counter(server.name for server in servers).items() if count > 1]
    if twice:
        raise ToolsError(f"two tool servers have the name {twice[0]!r}: rename one")
    with start_blocking_portal(name="tools") as portal:
        try:
            _, connections = portal.start_task(_hold, servers, limits.start_timeout_s)
            offers, problems = portal.call(_offers, connections)
            yield ToolBox(portal, _named(offers), limits, problems)
        finally:
            portal.call(portal.stop, True)


async def _hold(
    servers: Sequence[Server], start_timeout_s: float, *, task_status: TaskStatus[list[Connection]]
) -> None:
    """Hold the connections' tasks until cancelled."""
    async with anyio.create_task_group() as tasks:
        task_status.started([Connection(server, tasks, start_timeout_s) for server in servers])
        await anyio.sleep_forever()


async def _offers(connections: Sequence[Connection]) -> tuple[list[tuple[Connection, types.Tool]], list[str]]:
    """Start the servers concurrently; return all their tools in the order of the servers, and lines about problems."""
    offers: dict[str, list[types.Tool]] = {}
    problems: dict[str, list[str]] = {}

    async def ask(connection: Connection) -> None:
        name = connection.server.name
        try:
            offers[name], problems[name] = await connection.tools()
        except NotStarted as lost:
            problems[name] = [str(lost)]

    async with anyio.create_task_group() as asking:
        for connection in connections:
            asking.start_soon(ask, connection)
    names = [connection.server.name for connection in connections]
    lines = [f"{name}: {problem}" for name in names for problem in problems[name]]
    if connections and not offers:
        raise ToolsError(f"no tool server starts: {'; '.join(lines)}")
    return [(connection, tool) for connection in connections for tool in offers.get(connection.server.name, ())], lines


def _named(offers: Sequence[tuple[Connection, types.Tool]]) -> dict[str, Tool]:
    """Return the tools by different names that fit into a call's id.

    Names that occur twice get their server's name as prefix, and a number if that does not help.
    """
    counts = Counter(_plain(tool.name) for _, tool in offers)
    tools: dict[str, Tool] = {}
    for connection, tool in offers:
        plain = _plain(tool.name)
        name = plain = plain if counts[plain] == 1 else f"{_plain(connection.server.name)}_{plain}"
        number = 2
        while name in tools:
            name, number = f"{plain}_{number}", number + 1
        tools[name] = Tool(name, tool.description or "", tool.input_schema, connection, tool.name)
    return tools


def _plain(name: str) -> str:
    return _NOT_IN_A_NAME.sub("_", unicodedata.normalize("NFC", name)) or "_"


def read_result(result: types.CallToolResult, max_chars: int) -> ToolResult:
    """Return the result's text: its text parts, and a note for each other part.

    Text of more than ``max_chars`` characters is cut there, and a note of the cut is added. A result without parts
    becomes its structured content as JSON.
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
