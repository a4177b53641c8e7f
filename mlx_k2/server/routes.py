"""The routes of the server. Knows HTTP and the APIs' formats, but no stages."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mlx_k2.coordinator.handle import Event, Finished
from mlx_k2.errors import MlxK2Error
from mlx_k2.server.api_errors import from_program, invalid
from mlx_k2.server.chat_completions import ChatFormat, ChatFrames, chat_body
from mlx_k2.server.chat_reply import ChatReply
from mlx_k2.server.chat_request import ChatRequest, read_chat_request
from mlx_k2.server.completion_request import (
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    read_completion_request,
)
from mlx_k2.server.event_stream import EventStream
from mlx_k2.server.front import OWNER, REQUEST_ID
from mlx_k2.server.language_model import Generation
from mlx_k2.server.metrics import CONTENT_TYPE
from mlx_k2.server.openapi import document
from mlx_k2.server.request_body import read_body
from mlx_k2.server.request_fields import GenerationFields, read_fields
from mlx_k2.server.server_state import ServerState
from mlx_k2.server.sse import CompleteResponse, EventStreamResponse, Frames, json_response
from mlx_k2.server.status_stream import StatusStream
from mlx_k2.server.text_completions import TextFormat

Result = TypeVar("Result")
_MAX_ID_DIGITS = 16
_ID_PREFIXES = ("chatcmpl-", "cmpl-")


class Routes:
    """The handlers of all routes."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

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
        return json_response(self._state.model().files())

    def _model_entry(self) -> dict[str, Any]:
        entry = {"id": self._state.model_name, "object": "model", "created": self._state.created}
        entry |= {"owned_by": "mlx-k2"}
        context_tokens = self._state.context_tokens
        return entry if context_tokens is None else entry | {"max_model_len": context_tokens}

    async def _cancel(self, request: Request) -> Response:
        written = request_id = request.path_params["id"]
        for prefix in _ID_PREFIXES:
            request_id = request_id.removeprefix(prefix)
        self._state.cancel(request_id, request.scope[OWNER])
        return json_response({"id": written, "cancelled": True})

    # ---- tokens

    async def _tokenize(self, request: Request) -> Response:
        model = self._state.model()
        body = await read_body(request)

        def tokenize() -> list[int]:
            asked = read_fields(body, TokenizeRequest)
            text = asked.content if asked.prompt is None else asked.prompt
            if text is not None:
                return model.tokenizer.encode_text(text)
            if asked.messages is None:
                raise invalid("give a text as prompt, or messages", "prompt")
            return model.chat_prompt(read_chat_request(body), request.scope[OWNER])[0]

        tokens = await _on_worker(tokenize)
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": model.context_tokens})

    async def _detokenize(self, request: Request) -> Response:
        model = self._state.model()
        body = await read_body(request)
        text = await _on_worker(lambda: model.text_of(read_fields(body, DetokenizeRequest).tokens))
        return json_response({"prompt": text})

    # ---- generation

    async def _chat(self, request: Request) -> ASGIApp:
        self._state.check_ready()
        model = self._state.model()
        body = await read_body(request)

        def prepare() -> tuple[ChatRequest, Generation]:
            chat = read_chat_request(body)
            self._state.check_model(chat.model)
            return chat, model.chat(chat, request.scope[OWNER])

        chat, generation = await _on_worker(prepare)
        stream = await self._open(request, generation)
        reply = ChatReply(generation, lambda: model.keep_turn(generation.digest, reply.message, reply.token_ids))
        options = self._state.options
        chat_format = ChatFormat(
            id=_ID_PREFIXES[0] + request.scope[REQUEST_ID],
            created=int(time.time()),
            model=model.name,
            tokenizer=model.tokenizer,
            mirrors_reasoning=options.mirrors_reasoning,
            wants_logprobs=bool(chat.logprobs),
        )
        frames = ChatFrames(
            chat_format,
            reply,
            include_usage=chat.wants_usage,
            return_progress=bool(chat.return_progress),
            keepalive=options.keepalive,
        )
        return self._response(chat, stream, frames, reply, lambda end: chat_body(chat_format, reply, end.summary))

    async def _completions(self, request: Request) -> ASGIApp:
        self._state.check_ready()
        model = self._state.model()
        body = await read_body(request)

        def prepare() -> tuple[CompletionRequest, Generation]:
            completion = read_completion_request(body)
            self._state.check_model(completion.model)
            return completion, model.completion(completion)

        completion, generation = await _on_worker(prepare)
        stream = await self._open(request, generation)
        reply = ChatReply(generation)
        head = {
            "id": _ID_PREFIXES[1] + request.scope[REQUEST_ID],
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }
        frames = TextFormat(head, reply, completion, self._state.options.keepalive)
        return self._response(completion, stream, frames, reply, frames.body)

    async def _open(self, request: Request, generation: Generation) -> EventStream:
        return await self._state.open(request.scope[REQUEST_ID], request.scope[OWNER], generation)

    def _response(
        self,
        asked: GenerationFields,
        stream: EventStream,
        frames: Frames,
        reply: ChatReply,
        body: Callable[[Finished], object],
    ) -> ASGIApp:
        headers = self._model_headers(asked.model)
        if asked.stream:
            return EventStreamResponse(stream, frames, headers, self._state.options.keepalive_s)

        def add(event: Event) -> None:
            reply.add(event)

        return CompleteResponse(stream, add, body, headers)

    def _model_headers(self, name: str | None) -> dict[str, str]:
        """Return a warning for a request that names another model."""
        if name in (None, self._state.model_name):
            return {}
        return {"warning": '299 mlx-k2 "another model was asked for; the answer is from the one that is served"'}


async def _on_worker(compute: Callable[[], Result]) -> Result:
    """Return the result of a computation that would block the event loop.

    Raises:
        ApiError: also for an error of the program.
    """
    try:
        return await asyncio.to_thread(compute)
    except MlxK2Error as error:
        raise from_program(error) from None
