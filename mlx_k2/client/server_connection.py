"""Requests to a running server over HTTP, and its errors as errors of this program. Knows no tokens."""

import http.client
import socket
import urllib.parse
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from mlx_k2.errors import ClusterError, EngineBusy, MlxK2Error, RequestError, RequestFailed, SetupError
from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import read_json

TIMEOUT_S = 600.0
"""The longest silence of a server. It sends a keep-alive every 10 s, unless its user has turned that off."""
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_EVENT_BYTES = 1024 * 1024
_DEFAULT_WAIT_S = 10.0
_DATA = b"data: "
CONNECTION_ERRORS = (OSError, http.client.HTTPException)
"""Errors of sockets, TLS and HTTP."""

Answer = TypeVar("Answer", bound=msgspec.Struct)


class Unavailable(ClusterError):
    """The error of a server that loads its model, or whose stages start again."""


class ErrorFields(msgspec.Struct, frozen=True):
    """The error of an answer."""

    message: str
    code: str | None = None


class _Failure(msgspec.Struct, frozen=True):
    error: ErrorFields


@dataclass(frozen=True)
class ServerAddress:
    """The base address of a server, as http://HOST:PORT, and the key that it may need."""

    url: str
    key: str | None = None

    def open(self) -> http.client.HTTPConnection:
        """Return a connection that is opened by its first request.

        Raises:
            SetupError: the URL is not one of a server, or the key cannot be sent.
        """
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise SetupError("MLX_K2_API_KEY has a line end or a letter that no key has")
        try:
            parts = urllib.parse.urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("no address")
            parts.hostname.encode("idna")  # as the look-up of the name does
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            return kind(parts.hostname, parts.port, timeout=TIMEOUT_S)
        except ValueError:
            raise SetupError(f"--connect {self.url} is not the address of a server: give http://HOST:PORT") from None

    def send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: object = None
    ) -> http.client.HTTPResponse:
        """Send a request and return its answer, whose body is not read yet.

        Raises:
            SetupError: there is no server, or it refuses the request.
            EngineBusy, Unavailable, ClusterError: it cannot serve the request now.
        """
        headers = {"content-type": "application/json"} | ({"x-api-key": self.key} if self.key else {})
        try:
            connection.request(method, path, None if body is None else msgspec.json.encode(body), headers)
            response = connection.getresponse()
            if response.status == 200:
                return response
            data = response.read(MAX_EVENT_BYTES)
        except CONNECTION_ERRORS as error:
            raise SetupError(f"there is no server at {self.url}: {error}") from None
        raise self._error(response, data)

    def get(self, path: str, kind: type[Answer]) -> Answer:
        """Return the answer of a GET request.

        Raises:
            SetupError, ClusterError: as ``send``; or the answer is not one of this program.
        """
        connection = self.open()
        try:
            return read_json(self.send(connection, "GET", path).read(MAX_BODY_BYTES), kind)
        except (JsonError, *CONNECTION_ERRORS) as error:
            raise SetupError(f"{self.url} is not a server of mlx-k2: {error}") from None
        finally:
            connection.close()

    def _error(self, response: http.client.HTTPResponse, data: bytes) -> MlxK2Error:
        try:
            failure = read_json(data, _Failure).error
        except JsonError:
            failure = ErrorFields(f"status {response.status}")
        if response.status == 401:
            return SetupError(
                f"{self.url} needs a key: set MLX_K2_API_KEY to one that `mlx-k2 keys add NAME` printed there"
            )
        text = f"{self.url}: {failure.message}"
        if response.status == 429:
            wait = response.headers.get("retry-after", "")
            return EngineBusy(text, float(wait) if wait.isascii() and wait.isdigit() else _DEFAULT_WAIT_S)
        if response.status == 503:
            return Unavailable(text)
        return RequestError(text) if response.status < 500 else ClusterError(text)


def event_data(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield the data of each server-sent event up to [DONE].

    Raises:
        ClusterError: the connection was lost.
        RequestFailed: the server ended this request.
    """
    try:
        while line := response.readline(MAX_EVENT_BYTES):
            data = line.removeprefix(_DATA).strip()
            if not line.startswith(_DATA):
                continue
            if data == b"[DONE]":
                return
            if data.startswith(b'{"error":'):
                failure = read_json(data, _Failure).error
                raise (RequestFailed if failure.code == "request_failed" else ClusterError)(failure.message)
            yield data
    except (JsonError, *CONNECTION_ERRORS) as error:
        raise ClusterError(f"the connection to the server was lost: {error}") from None
    raise ClusterError("the connection to the server was lost")


def shut_down(connection: http.client.HTTPConnection) -> None:
    """End the reading of a connection on another thread."""
    found: socket.socket | None = connection.sock
    if found is not None:
        with suppress(OSError):
            found.shutdown(socket.SHUT_RDWR)
