"""The ASGI application: its layers and its errors. Knows no socket."""

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from mlx_k2.server.access import Access
from mlx_k2.server.api_errors import INVALID, ApiError, defect_error
from mlx_k2.server.front import OuterLayer
from mlx_k2.server.routes import Routes
from mlx_k2.server.server_state import ServerState
from mlx_k2.server.sse import error_response


def make_app(state: ServerState, access: Access, log: Callable[[str], None]) -> ASGIApp:
    """Return the application. ``log`` receives a line for each request."""
    inner = Starlette(
        routes=Routes(state).table(),
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_defect},
    )
    inner.router.redirect_slashes = False
    return OuterLayer(inner, access, log)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "Starlette selects handlers by type"
    return error_response(error, request.scope)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "Starlette selects handlers by type"
    if error.status_code == 404:
        missing = ApiError(404, "not_found_error", "there is no such path", code="not_found")
        return error_response(missing, request.scope)
    refused = ApiError(error.status_code, INVALID, str(error.detail), headers=error.headers)
    return error_response(refused, request.scope)


async def _on_defect(request: Request, error: Exception) -> Response:  # noqa: ARG001 - a handler's argument
    """Answer 500. Starlette raises the error again afterwards, and the outermost layer logs it."""
    return error_response(defect_error(), request.scope)
