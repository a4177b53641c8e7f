"""Reading of a request's body under limits on size and time, and the fields that all requests for text share.

Knows no API.
"""

import asyncio
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from mlx_k2.json_text.parse import JsonError, parse_json
from mlx_k2.json_text.read import convert
from mlx_k2.server.api_errors import INVALID_REQUEST, ApiError, bad_request_error

MAX_BODY_BYTES = 32 * 1024 * 1024
BODY_TIMEOUT_S = 30.0
_CLOSE_CONNECTION = {"connection": "close"}
MAX_STOP_STRINGS = 16
MAX_CHOICES = 16

Fields = TypeVar("Fields", bound=msgspec.Struct)


class StreamOptions(msgspec.Struct, frozen=True):
    """Options of a streamed answer."""

    include_usage: bool | None = None


class GenerationFields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that every request for generated text may have. Unknown fields of a body are ignored."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    """Whether the answer continues after a stop token."""
    stop: str | list[str] | None = None
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    extra_body: Any = None
    service_tier: str | None = None
    """"flex" makes a background request: it runs while no other request waits or runs. Other values change nothing."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The field ``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit_tokens(self) -> int | None:
        """The most tokens of the answer; None: as many as fit into the context."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """The number of most likely tokens to report per position; None: report no log-probabilities."""
        return None


async def read_body(request: Request) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: 413 too large, 415 compressed, 408 not received within BODY_TIMEOUT_S. The connection is closed
            after the answer.
        ClientDisconnect: the client has closed the connection.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        message = f"a body in the encoding {encoding[:40]!r} is not read: send it uncompressed"
        raise ApiError(415, INVALID_REQUEST, message, headers=_CLOSE_CONNECTION)
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
        raise ApiError(408, INVALID_REQUEST, message, code="request_timeout", headers=_CLOSE_CONNECTION) from None
    return bytes(body)


def _too_large() -> ApiError:
    message = f"the body is larger than {MAX_BODY_BYTES} bytes"
    return ApiError(413, INVALID_REQUEST, message, code="request_too_large", headers=_CLOSE_CONNECTION)


def read_fields(body: bytes, kind: type[Fields]) -> Fields:
    """Return the fields of a JSON body as a struct of type ``kind``.

    Raises:
        ApiError: 400, the body is not JSON, or a field is malformed; names the field.
    """
    try:
        value = parse_json(body)
    except JsonError as error:
        raise bad_request_error(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request_error("the body must be a JSON object")
    try:
        return convert(value, kind)
    except JsonError as error:
        field, _, problem = str(error).partition(": ")  # "the whole" is no field, see convert
        raise bad_request_error(str(error), field if problem and field != "the whole" else None) from None


def check_fields(fields: GenerationFields) -> None:
    """Refuse values that the server cannot use.

    Raises:
        ApiError: 400; names the field.
    """
    check_field(fields.n is None or 1 <= fields.n <= MAX_CHOICES, "n", f"n is {fields.n}: give 1 to {MAX_CHOICES}")
    extra_body = fields.extra_body
    check_field(extra_body is None, "extra_body", "extra_body is an argument of OpenAI's client: send its fields")
    limit = fields.limit_tokens
    name = "max_tokens" if limit == fields.max_tokens else "max_completion_tokens"
    check_field(fields.min_tokens is None or fields.min_tokens >= 0, "min_tokens", "min_tokens: give at least 0")
    check_field(limit is None or limit >= 1, name, f"{name} is {limit}: give at least 1")
    check_field(len(fields.stop_strings) <= MAX_STOP_STRINGS, "stop", f"stop: give at most {MAX_STOP_STRINGS} strings")
    check_field("" not in fields.stop_strings, "stop", "stop: an empty string ends no answer")


def check_field(holds: bool, param: str, message: str) -> None:
    """Raise a 400 that names ``param`` unless ``holds``."""
    if not holds:
        raise bad_request_error(message, param)
