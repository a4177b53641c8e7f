"""Requests over a plain socket, and their answers."""

import json
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

CHAT_PATH = "/v1/chat/completions"
WAIT_S = 60.0
"""Deadline for each answer of a server."""


@dataclass(frozen=True)
class HttpAnswer:
    """The status, headers (names in lower case) and body of an answer. A chunked body is decoded."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The JSON objects of a stream of events, in their order, without [DONE]."""
        return [
            json.loads(line.removeprefix(b"data: ")) for line in self.body.split(b"\n") if line.startswith(b"data: {")
        ]

    @property
    def error(self) -> dict[str, Any]:
        """The error of the body; all of its four fields are there."""
        error: dict[str, Any] = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert isinstance(error["type"], str)
        return error


def request_bytes(method: str, path: str, body: object = None, **headers: str) -> bytes:
    """Return a request that closes its connection, unless ``headers`` replace this header.

    A body other than bytes and None becomes JSON.
    """
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Host": "localhost", "Content-Length": str(len(data)), "Connection": "close"} | headers
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode() + data


def connect(port: int) -> socket.socket:
    """Return a connection to a server on this machine, with a deadline."""
    return socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)


def send(port: int, method: str, path: str, body: object = None, **headers: str) -> socket.socket:
    """Send a request on a new connection, and return the connection."""
    connection = connect(port)
    connection.sendall(request_bytes(method, path, body, **headers))
    return connection


def exchange(connection: socket.socket, data: bytes) -> HttpAnswer:
    """Send bytes and return the answer, read until the server closes the connection."""
    with suppress(BrokenPipeError, ConnectionResetError):  # the server may answer before it has read everything
        connection.sendall(data)
    received_bytes = b""
    with suppress(ConnectionResetError):  # instead of the end, if the server did not read everything
        while part := connection.recv(65536):
            received_bytes += part
    return parse_answer(received_bytes)


def receive_until(connection: socket.socket, text: bytes, received_bytes: bytes = b"", count: int = 1) -> bytes:
    """Append to ``received_bytes`` until they have ``text`` ``count`` times, and return them."""
    while received_bytes.count(text) < count:
        part = connection.recv(65536)
        assert part, f"the answer ended without {text!r}: {received_bytes!r}"
        received_bytes += part
    return received_bytes


def receive_answer(connection: socket.socket, received_bytes: bytes = b"") -> HttpAnswer:
    """Return the answer that begins with ``received_bytes``, and close its connection."""
    with connection:
        while part := connection.recv(65536):
            received_bytes += part
    return parse_answer(received_bytes)


def parse_answer(received_bytes: bytes) -> HttpAnswer:
    """Return the answer of which all bytes are received."""
    head, _, body = received_bytes.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    is_chunked = headers.get("transfer-encoding") == "chunked"
    return HttpAnswer(int(status.split()[1]), headers, _decode_chunks(body) if is_chunked else body)


def _decode_chunks(body: bytes) -> bytes:
    """Return the content of a body in HTTP's chunked encoding, also of one that ends early."""
    chunks = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        chunks.append(rest[:length])
        body = rest[length + 2 :]
    return b"".join(chunks)
