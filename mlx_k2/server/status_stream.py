"""Status stream: the server's status as server-sent events, while a client listens. Knows no content of the status."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec
from starlette.types import Receive, Scope, Send

from mlx_k2.server.sse import KEEPALIVE_S, STREAM_HEADERS, on_disconnect

INTERVAL_S = 0.5


class StatusStream:
    """An event for each change of ``status()``, at most one in INTERVAL_S, until ``is_ending()``.

    Each event has an id, counted on from ``last_id``, the one that a client has seen last.
    """

    def __init__(self, status: Callable[[], dict[str, object]], is_ending: Callable[[], bool], last_id: int) -> None:
        self._status = status
        self._is_ending = is_ending
        self._id = last_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's argument
        """Send events, as an ASGI application."""
        gone = asyncio.Event()
        headers = [(name.encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
        async with on_disconnect(receive, gone.set):
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send_events(send, gone)
            await send({"type": "http.response.body", "body": b""})

    async def _send_events(self, send: Send, gone: asyncio.Event) -> None:
        before: dict[str, object] = {}
        sent_at = 0.0
        while not gone.is_set() and not self._is_ending():
            status = self._status()
            seen = {name: value for name, value in status.items() if name != "uptime_s"}
            body = b""
            if seen != before:
                before = seen
                self._id += 1
                body = b"id: %d\nevent: status\ndata: %s\n\n" % (self._id, msgspec.json.encode(status))
            elif time.monotonic() - sent_at >= KEEPALIVE_S:
                body = b": keep-alive\n\n"
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                sent_at = time.monotonic()
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_S):
                    await gone.wait()
