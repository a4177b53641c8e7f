"""The connection to one tool server: connect, call, reconnect after a loss. Runs in an event loop; knows no model."""

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

from mlx_k2.tools.servers import HttpServer, Server

_MAX_PAGES = 100
_MAX_LINES = 5
_MAX_LINE_CHARS = 500
_CONNECT_S = 10.0
_STDERR_S = 1.0

# The mcp package's messages for a closed connection. A server's own errors have other messages.
_OVER = ("Connection closed", "Session terminated")


class ServerLost(Exception):
    """The error for a server that ended or cannot be reached: the reason, with the last lines of its stderr."""


@dataclass
class _Link:
    """One link to a server, from connect to close."""

    client: Client
    tools: list[types.Tool]
    closing: anyio.Event = field(default_factory=anyio.Event)
    over: anyio.Event = field(default_factory=anyio.Event)
    reason: str = "it ended"


class Connection:
    """A server's tools and its calls. A task in ``tasks`` holds each link and closes it when the task group ends."""

    def __init__(self, server: Server, tasks: TaskGroup, start_timeout_s: float) -> None:
        self.server = server
        self._tasks = tasks
        self._start_timeout_s = start_timeout_s
        self._lock = anyio.Lock()
        self._link: _Link | None = None

    async def tools(self) -> list[types.Tool]:
        """Return the tools that the server offers.

        Raises:
            ServerLost: the server does not start, or not within ``start_timeout_s``.
        """
        return (await self._linked()).tools

    async def call(self, tool: str, arguments: dict[str, Any]) -> types.CallToolResult:
        """Call one of the server's tools and return its result.

        Raises:
            ServerLost: the server ended during the call, or could not be started.
            MCPError: the server refuses the call.
        """
        link = await self._linked()
        try:
            return await link.client.call_tool(tool, arguments)
        except Exception as error:
            if not (link.over.is_set() or _is_over(error)):
                raise
        link.closing.set()
        await link.over.wait()
        raise ServerLost(link.reason)

    async def _linked(self) -> _Link:
        async with self._lock:
            if self._link is None or self._link.over.is_set():
                try:
                    with anyio.fail_after(self._start_timeout_s):
                        self._link = await self._tasks.start(self._hold)
                except TimeoutError:
                    raise ServerLost(f"it did not answer within {self._start_timeout_s:g} s") from None
            return self._link

    async def _hold(self, *, task_status: TaskStatus[_Link]) -> None:
        """Connect, and hold the link until ``closing`` is set or the link breaks."""
        link: _Link | None = None
        words: deque[str] = deque(maxlen=_MAX_LINES)
        try:
            with _last_words(words) as stderr:
                async with Client(_transport(self.server, stderr)) as client:
                    link = _Link(client, await _all_tools(client))
                    task_status.started(link)
                    await link.closing.wait()
        except Exception as error:  # noqa: BLE001 - any exception of the package ends the connection
            reason = _reason(error, words)
            if link is None:
                raise ServerLost(reason) from None
            link.reason = reason
        else:
            link.reason = _reason(None, words)
        finally:
            if link is not None:
                link.over.set()


@contextlib.asynccontextmanager
async def _transport(server: Server, stderr: TextIO) -> AsyncIterator[Any]:
    """Open the streams to ``server`` for mcp's client."""
    if isinstance(server, HttpServer):
        timeout = httpx2.Timeout(_CONNECT_S, read=None)  # an answer can take long; the caller sets the deadline
        async with (
            httpx2.AsyncClient(headers=server.headers, timeout=timeout) as http,
            streamable_http_client(server.url, http_client=http) as streams,
        ):
            yield streams
    else:
        parameters = StdioServerParameters(
            command=server.command, args=list(server.args), env=server.env, cwd=server.cwd
        )
        async with stdio_client(parameters, errlog=stderr) as streams:
            yield streams


async def _all_tools(client: Client) -> list[types.Tool]:
    tools: list[types.Tool] = []
    cursor = None
    for _ in range(_MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            break
    return tools


@contextlib.contextmanager
def _last_words(lines: deque[str]) -> Iterator[TextIO]:
    """Yield a file for a server's stderr; on exit its last lines are in ``lines``."""
    read_end, write_end = os.pipe()

    def drain() -> None:
        with os.fdopen(read_end, encoding="utf-8", errors="replace") as stream:
            for line in iter(lambda: stream.readline(_MAX_LINE_CHARS), ""):
                if line.strip():
                    lines.append(line.rstrip())

    reader = threading.Thread(target=drain, name="tool server's stderr", daemon=True)
    reader.start()
    try:
        with os.fdopen(write_end, "w", encoding="utf-8") as stream:
            yield stream
    finally:
        reader.join(timeout=_STDERR_S)  # a child process of the server may hold the other end open


def _reason(error: BaseException | None, words: deque[str]) -> str:
    """Return why a connection ended: the innermost error, and the last lines of the server's stderr."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    why = "it ended" if error is None or _is_over(error) else str(error).rstrip(".") or type(error).__name__
    return f"{why}; it said last: {' | '.join(words)}" if words else why


def _is_over(error: BaseException) -> bool:
    closed = isinstance(error, anyio.ClosedResourceError | anyio.BrokenResourceError)
    return closed or (isinstance(error, MCPError) and error.message in _OVER)
