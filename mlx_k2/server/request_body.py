"""The body of a request, read under limits on size and time. Knows no JSON."""

import asyncio

from starlette.requests import Request

from mlx_k2.server.api_errors import INVALID, ApiError

MAX_BODY_BYTES = 32 * 1024 * 1024
BODY_TIMEOUT_S = 30.0
_CLOSE = {"connection": "close"}


async def read_body(request: Request) -> bytes:
    """Return the whole body.

    Raises:
        ApiError: 413 too large, 415 compressed, 408 not sent within BODY_TIMEOUT_S. The connection is closed after 408
            and 413.
        ClientDisconnect: the client has closed the connection.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        message = f"a body in the encoding {encoding[:40]!r} is not read: send it uncompressed"
        raise ApiError(415, INVALID, message, headers=_CLOSE)
    length = request.headers.get("content-length", "0")
    if int(length) > MAX_BODY_BYTES:  # h11 has checked that it is a number
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        message = f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s"
        raise ApiError(408, INVALID, message, code="request_timeout", headers=_CLOSE) from None
    return bytes(body)


def _too_large() -> ApiError:
    message = f"the body is larger than {MAX_BODY_BYTES} bytes"
    return ApiError(413, INVALID, message, code="request_too_large", headers=_CLOSE)
