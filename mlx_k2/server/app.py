"""The ASGI application, and its outermost layer: request ids, hosts, origins, keys, errors and the log.

The layer is pure ASGI, since Starlette's BaseHTTPMiddleware would hide that a client has closed the connection.
"""

import asyncio
import re
import secrets
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_k2.server.access import Access
from mlx_k2.server.api_errors import INVALID_REQUEST, OWNER, REQUEST_ID, ApiError, defect_error, unavailable_error
from mlx_k2.server.api_keys import KEY_PREFIX
from mlx_k2.server.routes import Routes
from mlx_k2.server.server_state import ServerState
from mlx_k2.server.sse import error_response

_MAX_LOGGED_CHARS = 100
_REFUSAL = "mlx_k2.refusal"
"""The key in a scope for the reason why a request was refused before its path was looked up."""
CLIENT_CLOSED = 499
"""The status in the log for a request whose client closed the connection first, as in nginx."""


def make_app(state: ServerState, access: Access, log: Callable[[str], None]) -> ASGIApp:
    """Return the application. ``log`` is called with a line for each request."""
    routes = Starlette(
        routes=Routes(state).table(),
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_defect},
    )
    routes.router.redirect_slashes = False
    return OuterLayer(routes, access, log)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "Starlette selects handlers by type"
    return error_response(error, request.scope)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "Starlette selects handlers by type"
    if error.status_code == 404:
        message = "there is no such path; /openapi.json lists all, such as /v1/models"
        api_error = ApiError(404, "not_found_error", message, code="not_found")
    else:
        api_error = ApiError(error.status_code, INVALID_REQUEST, str(error.detail), headers=error.headers)
    return error_response(api_error, request.scope)


async def _on_defect(request: Request, error: Exception) -> Response:  # noqa: ARG001 - a handler's argument
    """Answer 500. Starlette then raises the error again, and the outermost layer logs it."""
    return error_response(defect_error(), request.scope)


@dataclass(frozen=True)
class OuterLayer:
    """The layer around the application ``routes``. ``log`` is called with a line for each request and each defect.

    Of a client's text a line has at most the method and, if it is no known one, the path, in _MAX_LOGGED_CHARS. For a
    request that is refused before its path is looked up, the line has the reason instead.
    """

    routes: ASGIApp
    access: Access
    log: Callable[[str], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        scope[REQUEST_ID] = request_id = secrets.token_hex(12)
        cors = self.access.cors_headers(scope)
        began = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ids = [(name, request_id.encode()) for name in (b"x-request-id", b"request-id")]
                message["headers"] = [*message.get("headers", ()), *ids, *cors]
            await send(message)

        try:
            await self._answer(scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_CLOSED
        except asyncio.CancelledError:  # the server ends, and the time for running requests is over
            if not status:
                await error_response(unavailable_error("the server ends"), scope)(scope, receive, send_with_id)
            raise
        except Exception as error:  # noqa: BLE001 - one request's defect must not end others
            self.log(f"request {request_id} ended by an unexpected error:\n{defect_text(error)}")
            if not status:
                await error_response(defect_error(), scope)(scope, receive, send_with_id)
        finally:
            self.log(f"{_subject(scope)} {status or CLIENT_CLOSED} {time.monotonic() - began:.2f} s {request_id}")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.access.check_origin(scope)
            if scope["method"] == "OPTIONS":  # the preflight request of a browser
                await Response(status_code=204)(scope, receive, send)
                return
            scope[OWNER] = self.access.owner(scope)
        except ApiError as error:
            scope[_REFUSAL] = error.message
            error.headers["connection"] = "close"  # the body is not read
            await error_response(error, scope)(scope, receive, send)
            return
        await self.routes(scope, receive, send)


def _subject(scope: Scope) -> str:
    """Return the reason of a refusal, or the method with the path as the route's pattern, else as the client sent it.

    The query is left out. So are a key in the path and what is not printable ASCII, and a URL instead of a path, which
    may have a password.
    """
    if _REFUSAL in scope:
        return f"refused ({scope[_REFUSAL]})"
    path = getattr(scope.get("route"), "path", None)
    if path is None:
        raw_path = scope["raw_path"].decode("latin-1")
        is_shown = raw_path.startswith("/") and OWNER in scope  # no browser's preflight request, which has no key
        path = re.sub(rf"{KEY_PREFIX}[^/]*|[^!-~]", "?", raw_path) if is_shown else "?"
    return f"{scope['method']} {path}"[:_MAX_LOGGED_CHARS]


def defect_text(error: BaseException) -> str:
    """Return an exception's traceback and type, without its message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    return "\n".join([*(f"  {frame.filename}:{frame.lineno} {frame.name}" for frame in frames), type(error).__name__])
