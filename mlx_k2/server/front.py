"""The outermost layer: ids, the Host allowlist, unexpected errors and the log of requests. Knows no route.

Pure ASGI: Starlette's BaseHTTPMiddleware would hide that a client has gone.
"""

import ipaddress
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Collection

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_k2.server.api_errors import ApiError
from mlx_k2.server.sse import error_response

REQUEST_ID = "mlx_k2.request_id"
"""The key of a request's scope for its id."""


class Front:
    """The layer around the application ``inner``. ``log`` receives a line for each request and each defect.

    A line has no text from the client other than the method: a path could hold anything.
    """

    def __init__(self, inner: ASGIApp, allowed_hosts: Collection[str], log: Callable[[str], None]) -> None:
        self._inner = inner
        self._is_allowed = HostAllowlist(allowed_hosts)
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        scope[REQUEST_ID] = request_id = secrets.token_hex(12)
        began = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if not self._is_allowed(scope):
                error = ApiError(403, "permission_error", "this Host is not allowed: see --allow-host")
                await error_response(error)(scope, receive, send_with_id)
                return
            await self._inner(scope, receive, send_with_id)
        except ClientDisconnect:
            status = 499
        except Exception as error:  # noqa: BLE001 - one request's defect must not end others
            self._log(f"request {request_id} met a defect:\n{defect_text(error)}")
            if not status:
                failure = ApiError(500, "server_error", "the server met a defect; its log has the details")
                await error_response(failure)(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "another path")
            self._log(f"{scope['method']} {route} {status or 499} {time.monotonic() - began:.2f} s {request_id}")


class HostAllowlist:
    """The rule for the Host header. It stops web pages that reach this server under a name of their own.

    Allowed are addresses as numbers, localhost, names in .local, this machine's name and the names in ``names``.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = {"localhost", socket.gethostname().lower(), *(name.lower() for name in names)}

    def __call__(self, scope: Scope) -> bool:
        """Return whether the request's only Host header is allowed."""
        hosts = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1:
            return False
        name = _without_port(hosts[0])
        return name in self._names or name.endswith(".local") or _is_address(name)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def defect_text(error: BaseException) -> str:
    """Return an error's type and the lines where it was raised, without its message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    return "\n".join([*(f"  {frame.filename}:{frame.lineno} {frame.name}" for frame in frames), type(error).__name__])
