"""The HTTP server: a listening socket, and a thread whose event loop serves its connections. Knows no route."""

import asyncio
import errno
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from mlx_k2.errors import SetupError
from mlx_k2.server.http_connection import MAX_HEADER_BYTES, Connection

KEEP_OPEN_TIMEOUT_S = 120
"""The time after which an idle connection is closed. Clients reuse connections that were idle for a minute or more."""
_BACKLOG = 2048
_SEND_BUFFER_BYTES = 256 * 1024
"""The send buffer of a connection. With a larger one, a client that reads nothing is detected later."""
_EXIT_TIMEOUT_S = 5.0


class HttpServer:
    """A context manager that binds the socket and starts the thread on entry. On exit it ends the thread.

    The exit waits at most _EXIT_TIMEOUT_S. ``drain_s`` is the time for running requests in ``drain``, at least 1 s.
    ``certfile`` is a certificate and ``keyfile`` its private key, in PEM format, for HTTPS; None: HTTP.
    ``log`` is called with a line for each request that is not HTTP.

    Raises on entry:
        SetupError: the address, the certificate or the key cannot be used.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        drain_s: float,
        certfile: str | None = None,
        keyfile: str | None = None,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._host = host
        self._port = port
        self._is_https = certfile is not None
        self._config = config = uvicorn.Config(
            app,
            http=cast(type[Connection], partial(Connection, log=log)),  # uvicorn only calls it
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # app.py logs requests and unexpected exceptions
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_OPEN_TIMEOUT_S,
            timeout_graceful_shutdown=max(1, round(drain_s)),
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            ssl_certfile=certfile,
            ssl_keyfile=keyfile,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self.must_end = threading.Event()
        """Set when the command must end: the thread has ended, or the engine has failed."""

    def __enter__(self) -> "HttpServer":
        try:
            self._config.load()
        except OSError as error:  # also an SSLError
            raise SetupError(f"--certfile and --keyfile cannot be used: {error.strerror or error}") from None
        self._socket = listening_socket(self._host, self._port)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.force_exit = True
        self._server.should_exit = True
        self._thread.join(_EXIT_TIMEOUT_S)

    @property
    def url(self) -> str:
        """The address as http://HOST:PORT or https://HOST:PORT."""
        return server_url(*self._socket.getsockname()[:2], is_https=self._is_https)

    @property
    def url_for_others(self) -> str:
        """The address as other machines reach it, see the function ``url_for_others``."""
        return url_for_others(*self._socket.getsockname()[:2], is_https=self._is_https)

    def drain(self) -> None:
        """Accept no more connections, and wait until the running requests have ended, at most ``drain_s``."""
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._server.serve([self._socket]))
        finally:
            self.must_end.set()


def server_url(host: str, port: int, *, is_https: bool) -> str:
    """Return the address of a server as http://HOST:PORT or https://HOST:PORT."""
    return f"{'https' if is_https else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def url_for_others(host: str, port: int, *, is_https: bool) -> str:
    """Return the address of a server; if it listens on all addresses, with the name of this machine."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host  # noqa: S104 - it is only compared
    return server_url(name, port, is_https=is_https)


def resolved_address(host: str, port: int) -> tuple[int, int, int, str, tuple[Any, ...]]:
    """Return the first address of a host, in the form that ``socket.getaddrinfo`` returns.

    Raises:
        SetupError: the host has no address.
    """
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise SetupError(f"--host {host} is not an address: give one of this machine's, as 127.0.0.1") from None


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        SetupError: the address is not this machine's, or the port is in use.
    """
    family, kind, protocol, _, address = resolved_address(host, port)
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)  # accepted connections inherit it
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise SetupError(
                f"port {port} of {host} is in use: give another --port, or end the program that has it"
            ) from None
        raise SetupError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return listening
