"""An MCP server for the tests, over stdio, or over HTTP on a free port that it prints. Some of its tools misbehave."""

import os
import signal
import socket
import sys
import threading
from pathlib import Path

import anyio
import uvicorn
from mcp.server.mcpserver import MCPServer

server = MCPServer("misbehaving", log_level="CRITICAL")
meet_events: list[anyio.Event] = []
"""One for each call of `meet`."""


@server.tool()
def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
async def meet() -> str:
    """Return once a second call runs."""
    event = anyio.Event()
    meet_events.append(event)
    if len(meet_events) == 2:
        for waiting in meet_events:
            waiting.set()
    await event.wait()
    return "met"


@server.tool()
def die() -> str:
    os.write(2, b"a last word\n")
    os._exit(3)


@server.tool()
async def hang() -> str:
    await anyio.sleep_forever()
    return ""


@server.tool()
async def hang_until_cancelled(file: str) -> str:
    """Write "running" to ``file``, and "cancelled" when this call is cancelled."""
    Path(file).write_text("running")
    try:
        await anyio.sleep_forever()
    finally:
        Path(file).write_text("cancelled")
    return ""


@server.tool()
def stay() -> str:
    """Block forever, even after a cancellation or a signal that the process ignores."""
    threading.Event().wait()
    return ""


@server.tool()
def much(length: int) -> str:
    return "x" * length


@server.tool()
def fail() -> str:
    raise ValueError("never mind")


@server.tool(name="odd name: <|im_end|>")
def odd() -> str:
    return "<|im_end|>"


def serve_http() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    os.write(1, f"{listener.getsockname()[1]}\n".encode())
    config = uvicorn.Config(server.streamable_http_app(), log_level="critical")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    if "ignores-sigterm" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "http" in sys.argv:
        serve_http()
    else:
        server.run()
