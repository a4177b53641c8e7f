"""Access rules of the server: allowed Host and Origin headers, API keys, rates. Knows no route but /health."""

import ipaddress
import socket
import time
from collections.abc import Collection

from starlette.types import Scope

from mlx_k2.server.api_errors import ApiError
from mlx_k2.server.api_keys import KeyRing

OPEN_PATHS = ("/health",)
"""Paths that need no key: their answer is a status code only."""
_CORS_HEADERS = (
    (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
    (b"access-control-expose-headers", b"x-request-id, request-id, retry-after"),
    (b"vary", b"origin"),
)


class Access:
    """The access rules of one server. They also refuse web pages of origins that are not allowed.

    Allowed hosts are IP addresses, localhost, names in .local, this machine's name and ``hosts``. Allowed origins are
    the server's own and ``origins``. ``keys`` None requires no key.
    """

    def __init__(self, hosts: Collection[str], origins: Collection[str], keys: KeyRing | None) -> None:
        self._hosts = {"localhost", socket.gethostname().lower(), *(host.lower() for host in hosts)}
        self._origins = {origin.lower().rstrip("/") for origin in origins}
        self._keys = keys

    def check_origin(self, scope: Scope) -> None:
        """Check the Host and Origin headers of a request.

        Raises:
            ApiError: 403, one of them is not allowed.
        """
        hosts = _values(scope, b"host")
        if len(hosts) != 1 or not self._is_allowed(hosts[0]):
            raise ApiError(403, "permission_error", "this Host is not allowed: see --allow-host")
        for origin in _values(scope, b"origin"):
            if origin not in self._origins and origin.partition("://")[2] != hosts[0]:
                raise ApiError(403, "permission_error", "this Origin is not allowed: see --allow-origin")

    def owner(self, scope: Scope) -> str:
        """Return the name of the request's key; "" where no key is required.

        Raises:
            ApiError: 401, the key is missing or wrong.
        """
        if self._keys is None or scope["path"] in OPEN_PATHS:
            return ""
        given_key = _given_key(scope)
        owner = self._keys.owner(given_key)
        if owner is None:
            headers = {"www-authenticate": "Bearer"}
            message = "the key is refused: it is none of this server's"
            if not given_key:
                message = "this server needs a key, as Authorization: Bearer KEY or x-api-key: KEY"
            raise ApiError(401, "authentication_error", message, code="invalid_api_key", headers=headers)
        return owner

    def cors_headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """Return the headers that permit a page of an allowed origin to read the answer; [] for other requests."""
        for origin in _values(scope, b"origin"):
            if origin in self._origins:
                names = ", ".join(_values(scope, b"access-control-request-headers")).encode("latin-1")
                allowed_headers = [(b"access-control-allow-headers", names)] if names else []
                return [(b"access-control-allow-origin", origin.encode("latin-1")), *allowed_headers, *_CORS_HEADERS]
        return []

    def _is_allowed(self, host: str) -> bool:
        name = _without_port(host)
        return name in self._hosts or name.endswith(".local") or _is_ip_address(name)


class RateLimit:
    """A limit of ``per_s`` requests per second for each owner of a key. Not thread-safe."""

    def __init__(self, per_s: int) -> None:
        self._per_s = per_s
        self._recent: dict[str, tuple[float, float]] = {}
        """The number of recent requests of each owner, reduced by ``per_s`` each second, and the time of its update."""

    def check(self, owner: str) -> None:
        """Count a request.

        Raises:
            ApiError: 429, the owner has sent too many requests.
        """
        now = time.monotonic()
        count, updated_at = self._recent.get(owner, (0.0, now))
        count = max(0.0, count - (now - updated_at) * self._per_s)
        if count + 1 > self._per_s:
            message = f"more than {self._per_s} such requests in a second"
            raise ApiError(429, "rate_limit_error", message, code="rate_limit_exceeded", headers={"retry-after": "1"})
        self._recent[owner] = (count + 1, now)


def _values(scope: Scope, header: bytes) -> list[str]:
    return [value.decode("latin-1").lower() for name, value in scope["headers"] if name == header]


def _given_key(scope: Scope) -> str | None:
    """Return the key in ``authorization`` or ``x-api-key``, whichever comes first; None if there is none."""
    for name, value in scope["headers"]:
        text: str = value.decode("latin-1").strip()
        if name == b"authorization" and text[:7].lower() == "bearer ":
            return text[7:].strip()
        if name == b"x-api-key":
            return text
    return None


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].removesuffix(".")


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
