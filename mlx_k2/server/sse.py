"""ASGI responses: JSON, and a stream of server-sent events. Both end when the client closes the connection.

Knows no API: a ReplyFormat converts the engine's events to server-sent events, or to the body of a JSON answer.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_k2.coordinator.handle import Event
from mlx_k2.errors import MlxK2Error
from mlx_k2.server.api_errors import (
    REQUEST_ID,
    ApiError,
    defect_error,
    messages_error,
    to_api_error,
    unavailable_error,
)
from mlx_k2.server.event_stream import EventStream

KEEPALIVE_S = 10.0
"""The default time without an event after which a keep-alive is sent."""
STATUS_INTERVAL_S = 0.5
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # a proxy with nginx sends each event on at once
}


class ReplyFormat(Protocol):
    """The answer to one request in the format of one API. Without a stream, only ``events`` and ``body`` are called."""

    def begin(self) -> bytes:
        """Return the bytes to send before the first event."""

    def events(self, events: list[tuple[int, Event]]) -> bytes:
        """Return the bytes to send for these events, each with its choice's number; after the last also the end."""

    def keepalive(self) -> bytes:
        """Return the bytes to send after a time without events; b"" to send nothing."""

    def error(self, error: ApiError) -> bytes:
        """Return the bytes to send for an error, the end of the stream included."""

    def body(self) -> object:
        """Return the body of the complete answer, after its last event. Called on a worker thread."""


def event_bytes(data: object, name: str = "") -> bytes:
    """Return one server-sent event whose data is ``data`` as JSON; ``name`` "" for an event without a name."""
    line = f"event: {name}\n".encode() if name else b""
    return line + b"data: " + msgspec.json.encode(data) + b"\n\n"


def json_response(data: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON answer."""
    return Response(msgspec.json.encode(data), status, dict(headers or {}), "application/json")


def error_response(error: ApiError, scope: Mapping[str, Any]) -> Response:
    """Return an error as a JSON answer in the format of the API that the path in ``scope`` belongs to."""
    status, body = error.status, error.body
    if scope["path"].startswith("/v1/messages"):
        status, body = messages_error(error, scope[REQUEST_ID])
    return json_response(body, status, error.headers)


@dataclass(frozen=True)
class EventStreamResponse:
    """A streamed answer. Headers are sent at once; then events, and a keep-alive after ``keepalive_s`` without one."""

    stream: EventStream
    reply_format: ReplyFormat
    headers: Mapping[str, str]
    keepalive_s: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's argument
        """Send the answer, as an ASGI application."""
        headers = [(name.encode(), value.encode()) for name, value in (STREAM_HEADERS | dict(self.headers)).items()]
        try:
            async with cancelled_on_disconnect(self.stream, receive):
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await self._send_body(send, self.reply_format.begin(), more=True)
                await self._send_events(send)
        except asyncio.CancelledError:  # the server ends, and the time for running requests is over
            await self._send_body(send, self.reply_format.error(unavailable_error("the server ends")), more=False)
            raise
        except Exception:  # a defect of the program, which the outermost layer logs
            await self._send_body(send, self.reply_format.error(defect_error()), more=False)
            raise

    async def _send_events(self, send: Send) -> None:
        """Send events until the last one, and a keep-alive after ``keepalive_s`` in which nothing was sent."""
        sent_at = time.monotonic()
        more = True
        while more:
            try:
                events = await self.stream.read(max(0.0, sent_at + self.keepalive_s - time.monotonic()))
                body = self.reply_format.events(events)
                more = not self.stream.has_ended
            except MlxK2Error as error:
                body, more = self.reply_format.error(to_api_error(error)), False
            if not body and more and time.monotonic() - sent_at >= self.keepalive_s:
                body = self.reply_format.keepalive()
                sent_at = time.monotonic()  # also if the format sends nothing, so that the next read waits again
            if body or not more:
                await self._send_body(send, body, more=more)
                sent_at = time.monotonic()

    async def _send_body(self, send: Send, body: bytes, *, more: bool) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": more})


@dataclass(frozen=True)
class CompleteResponse:
    """An answer that is sent when it is complete, as one JSON body."""

    stream: EventStream
    reply_format: ReplyFormat
    headers: Mapping[str, str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait for the answer and send it, as an ASGI application."""
        async with cancelled_on_disconnect(self.stream, receive):
            response = await self._response(scope)
        if response is not None:
            await response(scope, receive, send)

    async def _response(self, scope: Scope) -> Response | None:
        """Return the answer; None if the client has closed the connection."""
        try:
            while not self.stream.has_ended:
                events = await self.stream.read(None)
                if not self.stream.is_abandoned:
                    self.reply_format.events(events)
        except MlxK2Error as error:
            return error_response(to_api_error(error), scope)
        if self.stream.is_abandoned:
            return None
        return await asyncio.to_thread(lambda: json_response(self.reply_format.body(), headers=self.headers))


@asynccontextmanager
async def cancelled_on_disconnect(stream: EventStream, receive: Receive) -> AsyncIterator[None]:
    """Cancel the request when the client closes the connection, or when the ``with`` block ends."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        stream.abandon()

    watch_task = asyncio.create_task(watch())
    try:
        yield
    finally:
        watch_task.cancel()
        stream.close()


async def status_events(
    status: Callable[[], dict[str, object]], is_ending: Callable[[], bool], last_id: int
) -> AsyncIterator[bytes]:
    """Yield an event for each change of ``status()``, at most one in STATUS_INTERVAL_S, until ``is_ending()``.

    Their ids count on from ``last_id``, the last one that the client received. A change of uptime_s alone is no event.
    """
    sent_status: dict[str, object] = {}
    sent_at = 0.0
    while not is_ending():
        fields = status()
        present_status = {name: value for name, value in fields.items() if name != "uptime_s"}
        if present_status != sent_status:
            sent_status = present_status
            last_id += 1
            yield b"id: %d\nevent: status\ndata: %s\n\n" % (last_id, msgspec.json.encode(fields))
            sent_at = time.monotonic()
        elif time.monotonic() - sent_at >= KEEPALIVE_S:
            yield b": keep-alive\n\n"
            sent_at = time.monotonic()
        await asyncio.sleep(STATUS_INTERVAL_S)
