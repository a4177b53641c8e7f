"""Errors in the formats of the APIs, and the conversion of the program's errors to them. Knows no routes."""

import math
from collections.abc import Mapping

from mlx_k2.errors import Cancelled, EngineBusy, MlxK2Error, RequestFailed, SetupError

INVALID_REQUEST = "invalid_request_error"
NO_RETRY = {"x-should-retry": "false"}
"""With this header OpenAI's and Anthropic's SDKs do not send the request again."""
_RETRY_AFTER_S = 10
"""The time after which clients try again while the model loads or the stages restart."""
CONTEXT_OVERFLOW = "context_length_exceeded"
REQUEST_ID = "mlx_k2.request_id"
"""The key of the ASGI scope for the request's id."""
OWNER = "mlx_k2.owner"
"""The key of the ASGI scope for the name of the request's API key; "" if none is required."""
_ANTHROPIC_KINDS = {"server_error": "api_error", "unavailable_error": "api_error"}
"""Anthropic's error type for each ``kind`` that its API does not have."""
_ANTHROPIC_FIELDS = {
    "stop": "stop_sequences",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
}
"""The field of a messages request for a field of the chat request that it is converted to."""


class ApiError(Exception):
    """An answer with an error status, with OpenAI's "type" as ``kind``, and "param", the name of the field at fault."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """The JSON body in OpenAI's format. It has all four fields: some clients show no error if one is absent."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def messages_error(error: ApiError, request_id: str) -> tuple[int, dict[str, object]]:
    """Return status and JSON body of an error in Anthropic's format, in which only the message names the field."""
    status, kind, message = error.status, _ANTHROPIC_KINDS.get(error.kind, error.kind), error.message
    if error.code == "queue_full":
        status, kind = 529, "overloaded_error"
    elif status == 413:
        kind = "request_too_large"
    if error.param is not None:
        field = _ANTHROPIC_FIELDS.get(error.param, error.param)
        message = message.replace(error.param, field) if error.param in message else f"{field}: {message}"
    return status, {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def bad_request_error(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return an error 400: the request would fail again."""
    return ApiError(400, INVALID_REQUEST, message, param=param, code=code, headers=NO_RETRY)


def defect_error() -> ApiError:
    """Return an error 500 for an unexpected exception."""
    return ApiError(500, "server_error", "unexpected error in the server; its log has the details")


def unavailable_error(message: str) -> ApiError:
    """Return an error 503: the server cannot answer now."""
    headers = {"retry-after": str(_RETRY_AFTER_S)}
    return ApiError(503, "unavailable_error", message, code="unavailable", headers=headers)


def context_overflow(num_tokens: int, context_tokens: int, param: str) -> ApiError:
    """Return an error 400 for a prompt that does not fit. Agents look for its code, or for one of its two phrases."""
    return bad_request_error(
        f"This model's maximum context length is {context_tokens} tokens; "
        f"prompt is too long: {num_tokens} tokens > {context_tokens} maximum",
        param,
        CONTEXT_OVERFLOW,
    )


def to_api_error(error: MlxK2Error) -> ApiError:
    """Return the ApiError for an error of the program."""
    match error:
        case EngineBusy():
            headers = {"retry-after": str(math.ceil(error.wait_s))}
            message = f"the queue is full: send the request again in {headers['retry-after']} s"
            return ApiError(429, "rate_limit_error", message, code="queue_full", headers=headers)
        case SetupError():
            return bad_request_error(str(error))
        case RequestFailed():
            return ApiError(500, "server_error", str(error), code="request_failed")
        case Cancelled():
            return unavailable_error("the server ends")
    return unavailable_error("the stages have failed")
