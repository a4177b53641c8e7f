"""HTTP requests to a running server, and the conversion of its errors to errors of mlx_k2. Knows no tokens."""

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
"""The time without data after which a server counts as lost. A server sends a keep-alive every 10 s by default."""
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_EVENT_BYTES = 1024 * 1024
_DEFAULT_WAIT_S = 10.0
_DATA_PREFIX = b"data: "
CONNECTION_ERRORS = (OSError, http.client.HTTPException)
"""Errors of sockets, TLS and HTTP."""

Answer = TypeVar("Answer", bound=msgspec.Struct)


class Unavailable(ClusterError):
    """The error for a server whose model is loading, or whose stages restart."""


class _ErrorFields(msgspec.Struct, frozen=True):
    message: str
    code: str | None = None


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _ErrorFields


@dataclass(frozen=True)
class ServerAddress:
    """The URL of a server, http://HOST:PORT, and an API key; None sends no key."""

    url: str
    key: str | None = None

    def open(self) -> http.client.HTTPConnection:
        """Return a connection, which its first request opens.

        Raises:
            SetupError: the URL does not have the form http://HOST:PORT, or a header cannot contain the key.
        """
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise SetupError("MLX_K2_API_KEY has a line end or a letter that no key has")
        try:
            parts = urllib.parse.urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("no address")
            parts.hostname.encode("idna")  # raises UnicodeError, a ValueError, for a name that cannot be looked up
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            return kind(parts.hostname, parts.port, timeout=TIMEOUT_S)
        except ValueError:
            raise SetupError(f"--connect {self.url} is not the address of a server: give http://HOST:PORT") from None

    def send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: object = None
    ) -> http.client.HTTPResponse:
        """Send a request; return its response, whose body is not read yet.

        Raises:
            SetupError: there is no server, or it requires a key, or another one.
            RequestError: the server refuses the request.
            EngineBusy, Unavailable, ClusterError: the server cannot serve the request now.
        """
        headers = {"content-type": "application/json"} | ({"x-api-key": self.key} if self.key else {})
        try:
            connection.request(method, path, None if body is None else msgspec.json.encode(body), headers)
            response = connection.getresponse()
            if response.status == 200:
                return response
            data = response.read(MAX_EVENT_BYTES)
        except OSError as error:
            raise SetupError(f"there is no server at {self.url}: {_reason(error)}") from None
        except http.client.HTTPException:
            raise self._other_server("its answer is not HTTP") from None
        raise self._error(response, data)

    def get(self, path: str, kind: type[Answer]) -> Answer:
        """Return the body of the response to a GET request.

        Raises:
            SetupError: the answer is not of this program's server.
            MlxK2Error: what ``send`` raises.
        """
        connection = self.open()
        try:
            return read_json(self.send(connection, "GET", path).read(MAX_BODY_BYTES), kind)
        except (JsonError, *CONNECTION_ERRORS) as error:
            raise self._other_server(f"its answer to {path} cannot be read: {_reason(error)}") from None
        finally:
            connection.close()

    def _other_server(self, reason: object) -> SetupError:
        return SetupError(f"{self.url} is not a server of mlx-k2: {reason}")

    def _error(self, response: http.client.HTTPResponse, data: bytes) -> MlxK2Error:
        """Return the error that a response with the body ``data`` reports.

        A server of mlx-k2 has every path that is used here. A proxy may answer in its place, as with 413 or 502.
        """
        message = status_text = f"it answers with status {response.status}"
        with suppress(JsonError):
            message = read_json(data, _ErrorBody).error.message
        if response.status == 404 or (response.status < 404 and message == status_text):
            return self._other_server(status_text)
        if response.status == 401:
            problem = "refuses the key" if self.key else "needs a key"
            return SetupError(
                f"{self.url} {problem}: set MLX_K2_API_KEY to one that `mlx-k2 keys add NAME` printed there"
            )
        text = f"{self.url}: {message}"
        if response.status == 429:
            wait = response.headers.get("retry-after", "")
            return EngineBusy(text, float(wait) if wait.isascii() and wait.isdigit() else _DEFAULT_WAIT_S)
        if response.status == 503:
            return Unavailable(text)
        return RequestError(text) if response.status < 500 else ClusterError(text)


def event_data(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield the data of each server-sent event before [DONE], and an empty JSON object for a keep-alive comment.

    Raises:
        ClusterError: the connection was lost, or the server or its stages have ended.
        RequestFailed: the server ended this request.
    """
    try:
        while line := response.readline(MAX_EVENT_BYTES):
            if line.startswith(b":"):
                yield b"{}"
            if not line.startswith(_DATA_PREFIX):
                continue
            data = line.removeprefix(_DATA_PREFIX).strip()
            if data == b"[DONE]":
                return
            if data.startswith(b'{"error":'):
                fields = read_json(data, _ErrorBody).error
                raise (RequestFailed if fields.code == "request_failed" else ClusterError)(fields.message)
            yield data
    except (JsonError, *CONNECTION_ERRORS) as error:
        raise ClusterError(f"the connection to the server was lost: {_reason(error)}") from None
    raise ClusterError("the connection to the server was lost")


def _reason(error: Exception) -> object:
    """Return what an error says, without the number of an OSError."""
    return getattr(error, "strerror", None) or error


def shut_down(connection: http.client.HTTPConnection) -> None:
    """Shut down a connection, so that a read of it on another thread ends."""
    open_socket: socket.socket | None = connection.sock
    if open_socket is not None:
        with suppress(OSError):
            open_socket.shutdown(socket.SHUT_RDWR)
