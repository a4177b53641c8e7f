"""One tool server: connected, called, and connected anew after it was lost. Runs in an event loop; knows no names."""

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

# How the mcp package says that a connection is over; a server's own errors read otherwise.
_OVER = ("Connection closed", "Session terminated")


class ServerLost(Exception):
    """The server ended, or cannot be reached; says why, with the last lines of its stderr."""


@dataclass
class _Link:
    """A connection while it lasts."""

    client: Client
    tools: list[types.Tool]
    closing: anyio.Event = field(default_factory=anyio.Event)
    over: anyio.Event = field(default_factory=anyio.Event)
    reason: str = "it ended"


class Connection:
    """A server's tools, and its calls. Each link is held by one task in ``tasks``; with them it is closed."""

    def __init__(self, server: Server, tasks: TaskGroup, start_timeout_s: float) -> None:
        self.server = server
        self._tasks = tasks
        self._start_timeout_s = start_timeout_s
        self._lock = anyio.Lock()
        self._link: _Link | None = None

    async def tools(self) -> list[types.Tool]:
        """What the server offers.

        Raises:
            ServerLost: it does not start, or not in time.
        """
        return (await self._linked()).tools

    async def call(self, tool: str, arguments: dict[str, Any]) -> types.CallToolResult:
        """Call one of the server's tools.

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
        """Link up, and hold the link until it is to be closed or breaks."""
        link: _Link | None = None
        words: deque[str] = deque(maxlen=_MAX_LINES)
        try:
            with _last_words(words) as stderr:
                async with Client(_transport(self.server, stderr)) as client:
                    link = _Link(client, await _all_tools(client))
                    task_status.started(link)
                    await link.closing.wait()
        except Exception as error:  # noqa: BLE001 - whatever the package raises, the connection is over
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
    """The streams to ``server``, as mcp's client takes them."""
    if isinstance(server, HttpServer):
        timeout = httpx2.Timeout(_CONNECT_S, read=None)  # an answer may take long; the caller has the deadline
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
    """A file for a server's stderr, whose last lines are in ``lines`` afterwards."""
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
        reader.join(timeout=_STDERR_S)  # a process that the server left behind may hold the other end


def _reason(error: BaseException | None, words: deque[str]) -> str:
    """Why a connection is over: the innermost error, and what the server said last."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    why = "it ended" if error is None or _is_over(error) else str(error).rstrip(".") or type(error).__name__
    return f"{why}; it said last: {' | '.join(words)}" if words else why


def _is_over(error: BaseException) -> bool:
    closed = isinstance(error, anyio.ClosedResourceError | anyio.BrokenResourceError)
    return closed or (isinstance(error, MCPError) and error.message in _OVER)
