"""Tests of connections: clients that do not read, and clients that continue to send after their answer."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from starlette.types import Receive, Scope, Send

from mlx_k2.server import http_connection
from mlx_k2.server.http_server import HttpServer
from tests.server.http_client import WAIT_S, parse_answer, request_bytes
from tests.server.in_process import wait_until

LARGE_BODY = b"a" * 16_000_000  # more than the system's buffers hold


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer at once: /large with a large body, /stream with a large last part, others without a body."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-path", scope["path"].encode())]})
    if scope["path"] == "/stream":
        await send({"type": "http.response.body", "body": b"first part", "more_body": True})
    await send({"type": "http.response.body", "body": LARGE_BODY if scope["path"] in ("/large", "/stream") else b""})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a server of ``app`` with short time limits."""
    for name in ("WRITE_TIMEOUT_S", "HEADERS_TIMEOUT_S"):
        monkeypatch.setattr(http_connection, name, 0.3)
    with HttpServer(app, "127.0.0.1", 0, drain_s=1) as server:
        yield int(server.url.rpartition(":")[2])


@contextmanager
def connection_with_request(port: int, path: str, **headers: str) -> Iterator[socket.socket]:
    """Yield a connection on which a request was sent."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)  # a buffer that does not grow
        connection.settimeout(WAIT_S)
        connection.connect(("127.0.0.1", port))
        connection.sendall(request_bytes("POST", path, **headers))
        yield connection


def has_open_connection(port: int) -> bool:
    """Return whether the server on this port has an established connection."""
    connections = psutil.Process().net_connections("tcp")
    return any(
        connection.status == psutil.CONN_ESTABLISHED and connection.laddr and connection.laddr[1] == port
        for connection in connections
    )


@pytest.mark.parametrize("path", ["/large", "/stream"])
@pytest.mark.parametrize("kind", ["keep-alive", "close"])
def test_the_connection_of_a_client_that_does_not_read_its_answer_is_closed(port: int, path: str, kind: str) -> None:
    with connection_with_request(port, path, Connection=kind):
        wait_until(lambda: has_open_connection(port), "the connection is open")
        wait_until(lambda: not has_open_connection(port), "the server has closed the connection")


def test_a_client_that_reads_slowly_gets_its_whole_answer(port: int) -> None:
    with connection_with_request(port, "/large") as connection:
        received_bytes = bytearray()
        pause = threading.Event()
        while part := connection.recv(1 << 18):
            received_bytes += part
            pause.wait(0.01)  # in all longer than WRITE_TIMEOUT_S
    assert parse_answer(bytes(received_bytes)).body == LARGE_BODY


def test_the_connection_of_a_client_that_sends_its_body_after_the_answer_is_closed(port: int) -> None:
    headers = {"Content-Length": "1000000000", "Connection": "keep-alive"}
    with connection_with_request(port, "/small", **headers) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(int(WAIT_S / 0.01)):
                connection.sendall(b"a")
                threading.Event().wait(0.01)


def test_more_connections_than_the_limit_are_closed_and_the_others_work(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 3
    monkeypatch.setattr(http_connection, "MAX_CONNECTIONS", limit)
    monkeypatch.setattr(http_connection, "HEADERS_TIMEOUT_S", WAIT_S)  # the connections wait without a request
    address = ("127.0.0.1", port)
    with contextlib.ExitStack() as stack:
        first, *_ = [stack.enter_context(socket.create_connection(address, timeout=WAIT_S)) for _ in range(limit)]
        with socket.create_connection(address, timeout=WAIT_S) as refused, contextlib.suppress(ConnectionResetError):
            assert refused.recv(10) == b""
        first.sendall(b"GET /small HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert first.recv(100).startswith(b"HTTP/1.1 200")


def test_the_end_of_the_servers_thread_is_reported() -> None:
    with HttpServer(app, "127.0.0.1", 0, drain_s=1) as server:
        assert not server.must_end.is_set()
        server._server.should_exit = True
        assert server.must_end.wait(WAIT_S)
