"""The routes of the server. Knows HTTP and the APIs' formats, but no stages."""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mlx_k2.errors import MlxK2Error
from mlx_k2.server.api_errors import bad_request_error, to_api_error
from mlx_k2.server.chat_completions import ChatFormat, CompletionFormat
from mlx_k2.server.chat_reply import ChatReply
from mlx_k2.server.chat_request import ChatRequest, read_chat_request
from mlx_k2.server.completion_request import (
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    read_completion_request,
)
from mlx_k2.server.front import OWNER, REQUEST_ID
from mlx_k2.server.language_model import Generation, LanguageModel
from mlx_k2.server.metrics import CONTENT_TYPE
from mlx_k2.server.openapi import document
from mlx_k2.server.request_body import read_body
from mlx_k2.server.request_fields import GenerationFields, read_fields
from mlx_k2.server.server_state import ServerState
from mlx_k2.server.sse import STREAM_HEADERS, EventStreamResponse, WholeResponse, json_response
from mlx_k2.server.status_stream import StatusStream
from mlx_k2.server.text_completions import TextFormat

Result = TypeVar("Result")
_MAX_ID_DIGITS = 16
_MAX_PREPARING = 4
"""The most requests whose prompts are made at once, each on a worker thread."""
_CHAT_PREFIX, _TEXT_PREFIX = "chatcmpl-", "cmpl-"
_OTHER_MODEL = "another model was asked for; the answer is from the one that is served"
_MAX_WARNINGS, _MAX_WARNING_SIZE = 8, 300


class Routes:
    """The handlers of all routes."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._workers = asyncio.Semaphore(_MAX_PREPARING)

    def table(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/openapi.json", self._openapi, methods=["GET"]),
            Route("/v1/status", self._status, methods=["GET"]),
            Route("/v1/status/events", self._status_events, methods=["GET"]),
            Route("/v1/model-files", self._model_files, methods=["GET"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/requests/{id}/cancel", self._cancel, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
        ]

    # ---- the server

    async def _health(self, request: Request) -> Response:  # noqa: ARG002 - a route's argument
        return Response(status_code=200 if self._state.name == "ready" else 503)

    async def _metrics(self, request: Request) -> Response:  # noqa: ARG002 - a route's argument
        return Response(self._state.metrics.text(), media_type=CONTENT_TYPE)

    async def _openapi(self, request: Request) -> Response:  # noqa: ARG002 - a route's argument
        return json_response(document())

    async def _status(self, request: Request) -> Response:
        status = self._state.status(request.scope[OWNER])
        return json_response(status | {"history": self._state.activity.history()})

    async def _status_events(self, request: Request) -> ASGIApp:
        if request.method == "HEAD":
            return Response(headers=STREAM_HEADERS)
        owner = request.scope[OWNER]
        seen = request.headers.get("last-event-id", "")
        last_id = int(seen) if seen.isascii() and seen.isdigit() and len(seen) < _MAX_ID_DIGITS else 0
        return StatusStream(lambda: self._state.status(owner), lambda: self._state.is_ending, last_id)

    async def _models(self, request: Request) -> Response:  # noqa: ARG002 - a route's argument
        return json_response({"object": "list", "data": [self._model_entry()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._state.model_name:
            raise self._state.unknown_model(name)
        return json_response(self._model_entry())

    async def _model_files(self, request: Request) -> Response:  # noqa: ARG002 - a route's argument
        files = self._state.model().files
        return await asyncio.to_thread(lambda: json_response(files()))

    def _model_entry(self) -> dict[str, Any]:
        return {
            "id": self._state.model_name,
            "object": "model",
            "created": self._state.created,
            "owned_by": "mlx-k2",
            "max_model_len": self._state.context_tokens,
        }

    async def _cancel(self, request: Request) -> Response:
        written = request_id = request.path_params["id"]
        for prefix in (_CHAT_PREFIX, _TEXT_PREFIX):
            request_id = request_id.removeprefix(prefix)
        self._state.cancel(request_id, request.scope[OWNER])
        return json_response({"id": written, "cancelled": True})

    # ---- tokens

    async def _tokenize(self, request: Request) -> Response:
        def tokenize(model: LanguageModel, body: bytes) -> list[int]:
            asked = read_fields(body, TokenizeRequest)
            text = asked.content if asked.prompt is None else asked.prompt
            if text is not None:
                return model.tokenizer.encode_text(text)
            if asked.messages is None:
                raise bad_request_error("give a text as prompt, or messages", "prompt")
            return model.chat_prompt(read_chat_request(body), request.scope[OWNER])[0]

        tokens = await self._prepare(request, tokenize)
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": self._state.context_tokens})

    async def _detokenize(self, request: Request) -> Response:
        def detokenize(model: LanguageModel, body: bytes) -> str:
            return model.text_of(read_fields(body, DetokenizeRequest).tokens)

        return json_response({"prompt": await self._prepare(request, detokenize)})

    # ---- generation

    async def _chat(self, request: Request) -> ASGIApp:
        def prepare(model: LanguageModel, body: bytes) -> tuple[ChatRequest, Generation]:
            chat = read_chat_request(body)
            self._state.check_model(chat.model)
            return chat, model.chat(chat, request.scope[OWNER])

        self._state.check_ready()
        chat, generation = await self._prepare(request, prepare, is_queued=True)
        replies = [_stored_reply(self._state.model(), generation) for _ in generation.submissions]
        form = ChatFormat(self._head(_CHAT_PREFIX, request), replies, chat, self._state.options)
        return await self._answer(request, chat, generation, replies, form)

    async def _completions(self, request: Request) -> ASGIApp:
        def prepare(model: LanguageModel, body: bytes) -> tuple[CompletionRequest, Generation]:
            completion = read_completion_request(body)
            self._state.check_model(completion.model)
            return completion, model.completion(completion)

        self._state.check_ready()
        completion, generation = await self._prepare(request, prepare, is_queued=True)
        replies = [ChatReply(generation) for _ in generation.submissions]
        form = TextFormat(self._head(_TEXT_PREFIX, request), replies, completion, self._state.options)
        return await self._answer(request, completion, generation, replies, form)

    async def _prepare(
        self, request: Request, compute: Callable[[LanguageModel, bytes], Result], *, is_queued: bool = False
    ) -> Result:
        """Read the body, and return what ``compute`` makes of it on a worker thread.

        Raises:
            ApiError: also for an error of the program.
        """
        model = self._state.model()
        with self._state.preparing(is_queued=is_queued):
            body = await read_body(request)
            try:
                async with self._workers:
                    return await asyncio.to_thread(compute, model, body)
            except MlxK2Error as error:
                raise to_api_error(error) from None

    def _head(self, prefix: str, request: Request) -> dict[str, Any]:
        return {
            "id": prefix + request.scope[REQUEST_ID],
            "created": int(time.time()),
            "model": self._state.model_name,
        }

    async def _answer(
        self,
        request: Request,
        asked: GenerationFields,
        generation: Generation,
        replies: Sequence[ChatReply],
        form: CompletionFormat,
    ) -> ASGIApp:
        """Submit the request and return its answer."""
        warnings = [_OTHER_MODEL] if asked.model not in (None, self._state.model_name) else []
        headers = warning_headers([*warnings, *generation.warnings])
        stream = await self._state.open(request.scope[REQUEST_ID], request.scope[OWNER], generation)
        if asked.stream:
            return EventStreamResponse(stream, form, headers, self._state.options.keepalive_s)
        return WholeResponse(stream, lambda index, event: replies[index].add(event), form.body, headers)


def _stored_reply(model: LanguageModel, generation: Generation) -> ChatReply:
    """Return an empty reply that is stored for the client's next request when it is complete."""
    reply = ChatReply(generation, lambda: model.keep_turn(generation.digest, reply.message, reply.token_ids))
    return reply


def warning_headers(warnings: Sequence[str]) -> dict[str, str]:
    """Return a header with ``warnings``, in the characters that a header may have."""
    texts = [re.sub(r'[^ -~]|["\\]', "?", warning[:_MAX_WARNING_SIZE]) for warning in warnings[:_MAX_WARNINGS]]
    return {"warning": ", ".join(f'299 mlx-k2 "{text}"' for text in texts)} if texts else {}
