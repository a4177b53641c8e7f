"""Connections of clients: uvicorn's, with limits on time and size, and with errors in the API's format."""

import asyncio
import math
import secrets
from collections.abc import Callable
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_k2.server.api_errors import bad_request_error

MAX_HEADER_BYTES = 65536
MAX_CONNECTIONS = 512
HEADERS_TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 30.0
"""The time after which a connection is closed if its client reads nothing of the waiting bytes."""


class Connection(H11Protocol):
    """A connection that is closed when the client sends headers or reads answers too slowly.

    The application learns of the end of the connection at once, even if data of a next request wait to be read. It does
    not see a request that is not HTTP: ``log`` is called with a line for it.
    """

    def __init__(self, *arguments: Any, log: Callable[[str], None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._log = log
        self._headers_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the headers timer. The transport reports even one waiting byte, so that each wait has a limit."""
        assert isinstance(transport, asyncio.Transport), "a stream connection can be written"
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=1, low=0)
        self._start_headers_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._cancel_headers_timer()
        self._cancel_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read data. The headers timer runs while headers are incomplete, or the body of an answered request arrives.

        uvicorn stops reading when data follow a complete request, and would then miss the end of the connection.
        Therefore reading continues here, up to MAX_HEADER_BYTES.
        """
        if self.conn.their_state is h11.MUST_CLOSE:
            return  # the client has asked to close the connection after its request
        super().data_received(data)
        is_answered_early = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if self.conn.their_state is not h11.IDLE and not is_answered_early:
            self._cancel_headers_timer()
        elif self._headers_timer is None:
            self._start_headers_timer()
        if self.conn.their_state is h11.DONE and self.flow.read_paused:
            if len(self.conn.trailing_data[0]) > MAX_HEADER_BYTES:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def pause_writing(self) -> None:
        """Pause the application, and start the write timer: bytes wait for the client."""
        super().pause_writing()
        self._check_client_reads()

    def resume_writing(self) -> None:
        """Stop the write timer, and continue the application: the client has read everything."""
        self._cancel_write_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's argument
        """Answer data that are not HTTP with an error 400 in the API's format, and close the connection."""
        error = bad_request_error("this is not a valid HTTP request, or its headers are too large")
        if self.cycle is not None:  # drop an answer that the application has not sent yet
            self.cycle.disconnected = True
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun, or is complete
            self.transport.close()
            return
        body = msgspec.json.encode(error.body)
        request_id = secrets.token_hex(12)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
        ]
        head = h11.Response(status_code=error.status, headers=headers, reason=b"Bad Request")
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._log(f"malformed HTTP {error.status} {request_id}")

    def _start_headers_timer(self) -> None:
        self._headers_timer = self.loop.call_later(HEADERS_TIMEOUT_S, self.transport.abort)

    def _cancel_headers_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _check_client_reads(self, bytes_before: float = math.inf) -> None:
        """End the connection unless fewer than ``bytes_before`` wait for the client; repeat after WRITE_TIMEOUT_S."""
        num_bytes = self.transport.get_write_buffer_size()
        if num_bytes >= bytes_before:
            self.transport.abort()
        else:
            self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self._check_client_reads, num_bytes)

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
