"""One connection of a client: uvicorn's, with limits on time and size, and errors in the API's shape."""

import asyncio
import math
import secrets
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_k2.server.api_errors import bad_request_error

MAX_HEADER_BYTES = 65536
MAX_CONNECTIONS = 512
HEADERS_TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 30.0
"""A connection is closed after its client has read nothing for this long."""


class Connection(H11Protocol):
    """A connection that is closed when a request's headers or the client's reading take too long.

    The application gets the end of a connection at once, whatever the client has sent after its request.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._headers_due: asyncio.TimerHandle | None = None
        self._write_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin. The transport reports any data that waits for the client, so that each wait has its limit."""
        assert isinstance(transport, asyncio.Transport), "a stream connection can be written"
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=1, low=0)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._cancel_timer()
        self._cancel_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read data. The timer runs while headers are incomplete, and while the body of an answered request comes.

        uvicorn stops reading at data that follow a complete request. The end of the connection would then not be
        noticed, so reading continues here, up to MAX_HEADER_BYTES.
        """
        if self.conn.their_state is h11.MUST_CLOSE:
            return  # the client has asked to close the connection after its request
        super().data_received(data)
        is_answered_early = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if self.conn.their_state is not h11.IDLE and not is_answered_early:
            self._cancel_timer()
        elif self._headers_due is None:
            self._await_headers()
        if self.conn.their_state is h11.DONE and self.flow.read_paused:
            if len(self.conn.trailing_data[0]) > MAX_HEADER_BYTES:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def pause_writing(self) -> None:
        """Begin to wait for the client."""
        super().pause_writing()
        self._await_client()

    def resume_writing(self) -> None:
        """Stop the timer: the client has read everything."""
        self._cancel_write_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's argument
        """Answer a request that is not HTTP in the API's shape, and close the connection."""
        error = bad_request_error("this is not a valid HTTP request, or its headers are too large")
        if self.cycle is not None:  # the application may be about to answer: that answer is dropped
            self.cycle.disconnected = True
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun, or was sent already
            self.transport.close()
            return
        body = msgspec.json.encode(error.body)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", secrets.token_hex(12).encode()),
            (b"connection", b"close"),
        ]
        for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _await_headers(self) -> None:
        self._headers_due = self.loop.call_later(HEADERS_TIMEOUT_S, self.transport.abort)

    def _cancel_timer(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _await_client(self, bytes_before: float = math.inf) -> None:
        """Look at the waiting bytes again after WRITE_TIMEOUT_S; end the connection if the client has read none."""
        num_bytes = self.transport.get_write_buffer_size()
        if num_bytes >= bytes_before:
            self.transport.abort()
        else:
            self._write_due = self.loop.call_later(WRITE_TIMEOUT_S, self._await_client, num_bytes)

    def _cancel_write_timer(self) -> None:
        if self._write_due is not None:
            self._write_due.cancel()
            self._write_due = None
