"""Connections to tool servers: connect, call, connect again after a loss. Used from one event loop."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import anyio
import httpx2
from anyio.abc import TaskGroup, TaskStatus
from mcp import Client, MCPError, StdioServerParameters, types
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CONNECTION_CLOSED, INVALID_REQUEST, METHOD_NOT_FOUND, UNSUPPORTED_PROTOCOL_VERSION
from pydantic import ValidationError

from mlx_k2.http_reason import http_reason
from mlx_k2.tools.server_output import ServerOutput, inspected_streams
from mlx_k2.tools.servers import HttpServer, PythonFile, Server

_MAX_PAGES = 100
_MAX_STDERR_LINES = 5
_MAX_STDERR_LINE_CHARS = 500
_MAX_EVENT_BYTES = 64 * 2**20
_CONNECT_TIMEOUT_S = 10.0
_STDERR_TIMEOUT_S = 1.0

# Messages of the mcp package for a closed connection. A server's own errors have other messages.
_CLOSED_MESSAGES = ("Connection closed", "Session terminated")
# Messages of the mcp package for an HTTP status that is an error.
_HTTP_ERROR_MESSAGES = ("Server returned an error response", "Not Found")
# A server that answers `initialize` with one of these codes may know only the newer handshake.
_NO_INITIALIZE_CODES = (METHOD_NOT_FOUND, INVALID_REQUEST, UNSUPPORTED_PROTOCOL_VERSION)


class ServerLost(Exception):
    """The error for a server that ended. Its text is the reason, and the last lines of its stderr if there are any."""


class NotStarted(ServerLost):
    """The error for a server that does not start or cannot be reached. Its text begins with the server's name."""


class _Parameters(StdioServerParameters):
    """The parameters of a stdio server. Bytes that are not UTF-8 become surrogates, so that an error can name them."""

    encoding_error_handler: Any = "surrogateescape"


@dataclass
class _Link:
    """One link to a server, from its start to its end."""

    client: Client
    tools: list[types.Tool]
    output: ServerOutput
    close_requested: anyio.Event = field(default_factory=anyio.Event)
    ended: anyio.Event = field(default_factory=anyio.Event)
    end_reason: str = "it ended"


class Connection:
    """A server's tools, and calls to them. A task in ``tasks`` keeps a link open until the link or the group ends."""

    def __init__(self, server: Server, tasks: TaskGroup, start_timeout_s: float) -> None:
        self.server = server
        self._tasks = tasks
        self._start_timeout_s = start_timeout_s
        self._lock = anyio.Lock()
        self._link: _Link | None = None

    async def tools(self) -> tuple[list[types.Tool], list[str]]:
        """Return the server's tools, and lines for the user about what is wrong with them.

        Raises:
            NotStarted: the server does not start, or not within ``start_timeout_s``.
        """
        link = await self._open_link()
        return link.tools, link.output.problems

    @property
    def last_stray_line(self) -> str:
        """The last line of the server's stdout that is not a message, quoted; '' if there is none."""
        return "" if self._link is None else self._link.output.last_stray_line

    async def call(self, tool: str, arguments: dict[str, Any]) -> types.CallToolResult:
        """Call one of the server's tools and return its result.

        Raises:
            NotStarted: the server could not be started; the call was not sent.
            ServerLost: the server ended during the call. The next call starts it again.
            MCPError: the server answers with an error, or its answer cannot be read.
            pydantic.ValidationError: the result is not a valid MCP result.
        """
        link = await self._open_link()
        try:
            return await link.client.call_tool(tool, arguments)
        except Exception as error:
            if not (link.ended.is_set() or _is_closed_error(error)):
                raise _with_http_status(error, link.output) from error
            reason = None
            if isinstance(error, MCPError) and error.message not in _CLOSED_MESSAGES:
                reason = error.message  # it says more than the reason why the link ended
        link.close_requested.set()
        await link.ended.wait()
        raise ServerLost(reason or link.end_reason)

    async def _open_link(self) -> _Link:
        """Return the open link; connect if there is none."""
        async with self._lock:
            if self._link is None or self._link.ended.is_set():
                try:
                    with anyio.fail_after(self._start_timeout_s):
                        self._link = await self._tasks.start(self._keep_link_open)
                except TimeoutError:
                    raise NotStarted(
                        f"{self.server.name}: it did not answer within {self._start_timeout_s:g} s"
                    ) from None
            return self._link

    async def _keep_link_open(self, *, task_status: TaskStatus[_Link]) -> None:
        """Connect, and keep the link open until ``close_requested`` is set or the link breaks.

        `initialize` is tried before the newer handshake, because an older server exits at any other first request.
        """
        if not await self._connect("legacy", task_status):
            await self._connect("auto", task_status)

    async def _connect(self, mode: str, task_status: TaskStatus[_Link]) -> bool:
        """Connect with mcp's handshake ``mode``, and keep the link open. Return False if "legacy" is refused.

        Raises:
            NotStarted: the server does not start.
        """
        link: _Link | None = None
        last_lines: deque[str] = deque(maxlen=_MAX_STDERR_LINES)
        output = ServerOutput()
        try:
            with _stderr_file(last_lines) as stderr:
                async with Client(_transport(self.server, stderr, output), mode=mode) as client:
                    link = _Link(client, await _all_tools(client, output), output)
                    task_status.started(link)
                    await link.close_requested.wait()
        except Exception as error:  # noqa: BLE001 - any exception of the package ends the connection
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            if link is None and mode == "legacy" and isinstance(error, MCPError) and error.code in _NO_INITIALIZE_CODES:
                return False
            reason = _end_reason(_with_http_status(error, output), last_lines, self.server)
            if link is None:
                last_line = last_lines[-1] if last_lines else ""
                names_file = isinstance(self.server, PythonFile) and last_line.startswith(self.server.name)
                raise NotStarted(last_line if names_file else f"{self.server.name}: {reason}") from None
            link.end_reason = reason
        else:
            link.end_reason = _end_reason(None, last_lines, self.server)
        finally:
            if link is not None:
                link.ended.set()
        return True


@contextlib.asynccontextmanager
async def _transport(server: Server, stderr: TextIO, output: ServerOutput) -> AsyncIterator[Any]:
    """Open the streams to ``server`` for mcp's client; record in ``output`` what the client does not report."""
    async with contextlib.AsyncExitStack() as stack:
        if isinstance(server, HttpServer):

            async def record_status(response: httpx2.Response) -> None:
                if response.is_error and response.request.method == "POST":
                    output.http_status = f"{response.status_code} {response.reason_phrase}".rstrip()

            http = httpx2.AsyncClient(
                headers=server.headers,
                timeout=httpx2.Timeout(_CONNECT_TIMEOUT_S, read=None),  # the caller limits the time of an answer
                event_hooks={"response": [record_status]},
            )
            await stack.enter_async_context(http)
            transport = streamable_http_client(server.url, http_client=http, max_sse_event_size=_MAX_EVENT_BYTES)
            streams = await stack.enter_async_context(transport)
        else:
            parameters = _Parameters(command=server.command, args=list(server.args), env=server.env, cwd=server.cwd)
            streams = await stack.enter_async_context(stdio_client(parameters, errlog=stderr))
        yield await stack.enter_async_context(inspected_streams(streams, output))


async def _all_tools(client: Client, output: ServerOutput) -> list[types.Tool]:
    """Return the tools of all pages. A server without tools may refuse to list them."""
    tools: list[types.Tool] = []
    cursor = None
    for _ in range(_MAX_PAGES):
        try:
            page = await client.list_tools(cursor=cursor)
        except MCPError as error:
            if error.code != METHOD_NOT_FOUND:
                raise
            break
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            break
    if not tools and not output.problems:
        output.problems.append("it has no tools")
    return tools


@contextlib.contextmanager
def _stderr_file(last_lines: deque[str]) -> Iterator[TextIO]:
    """Yield a file for a server's stderr; on exit ``last_lines`` has its last lines."""
    read_end, write_end = os.pipe()

    def drain() -> None:
        with os.fdopen(read_end, encoding="utf-8", errors="replace") as stream:
            for line in iter(lambda: stream.readline(_MAX_STDERR_LINE_CHARS), ""):
                if line.strip():
                    last_lines.append(line.rstrip())

    reader = threading.Thread(target=drain, name="tool server's stderr", daemon=True)
    reader.start()
    try:
        with os.fdopen(write_end, "w", encoding="utf-8") as stream:
            yield stream
    finally:
        reader.join(timeout=_STDERR_TIMEOUT_S)  # a child process of the server may keep the pipe open


def _with_http_status(error: Exception, output: ServerOutput) -> Exception:
    """Return an HTTP error with the status, which mcp's client leaves out; return any other error unchanged."""
    if not isinstance(error, MCPError) or error.message not in _HTTP_ERROR_MESSAGES:
        return error
    hint = ": see its headers in the MCP file" if output.http_status.startswith(("401", "403")) else ""
    return MCPError(error.code, f"HTTP {output.http_status}{hint}")


def _end_reason(error: Exception | None, last_lines: deque[str], server: Server) -> str:
    """Return why a link ended: the error (None: the server or this program closed it), and the last lines of stderr."""
    if error is None or _is_closed_error(error):
        reason = "it ended"
    elif isinstance(error, MCPError) or not isinstance(server, HttpServer):
        reason = first_problem(error).rstrip(".") or type(error).__name__
    else:
        reason = http_reason(error)
    return f"{reason}; it wrote last: {' | '.join(last_lines)}" if last_lines else reason


def first_problem(error: Exception) -> str:
    """Return the message of an error, without errno; of a pydantic error the first malformed field and its problem."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename!r}"
    return str(error)


def _is_closed_error(error: BaseException) -> bool:
    """Return whether the error reports a closed connection."""
    if isinstance(error, MCPError):
        return error.code == CONNECTION_CLOSED or error.message in _CLOSED_MESSAGES
    return isinstance(error, anyio.ClosedResourceError | anyio.BrokenResourceError)
