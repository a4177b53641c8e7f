"""One connection of a client: uvicorn's, with a time limit for headers and errors in the API's shape."""

import asyncio
from typing import Any

import h11
import msgspec
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_k2.server.api_errors import ApiError, invalid
from mlx_k2.server.sse import ABORT

MAX_HEADER_BYTES = 65536
HEADERS_S = 30.0


class Connection(H11Protocol):
    """A connection that is closed when a request's headers take longer than HEADERS_S."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: give the application the means to close this connection at once."""
        assert isinstance(transport, asyncio.Transport), "a stream connection can be written"
        super().connection_made(transport)
        inner = self.app

        async def with_abort(scope: Scope, receive: Receive, send: Send) -> None:
            scope["extensions"] = {ABORT: transport.abort}
            await inner(scope, receive, send)

        self.app = with_abort
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._cancel_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read data. The timer runs while the headers of a request are incomplete."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._cancel_timer()
        elif self._headers_due is None:
            self._await_headers()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's argument
        """Answer a request that is not HTTP in the API's shape, and close the connection."""
        self._send_error(invalid("this is not a valid HTTP request, or its headers are too large"))

    def _send_error(self, error: ApiError) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun, or was sent already
            self.transport.close()
            return
        body = msgspec.json.encode(error.body)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _await_headers(self) -> None:
        self._headers_due = self.loop.call_later(HEADERS_S, self.transport.abort)

    def _cancel_timer(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None
