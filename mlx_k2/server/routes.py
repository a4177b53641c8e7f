"""The routes of the server. Knows HTTP and the service, but no stages."""

import asyncio
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mlx_k2.coordinator.handle import Event, Finished
from mlx_k2.errors import MlxK2Error
from mlx_k2.server.api_errors import ApiError, from_program
from mlx_k2.server.chat_completions import ChatFormat, ChatFrames, chat_body
from mlx_k2.server.chat_reply import ChatReply
from mlx_k2.server.chat_request import ChatRequest, read_chat_request
from mlx_k2.server.event_stream import EventStream
from mlx_k2.server.front import REQUEST_ID
from mlx_k2.server.request_body import read_body
from mlx_k2.server.served_model import Generation, ServedModel
from mlx_k2.server.service import Service
from mlx_k2.server.sse import CompleteResponse, EventStreamResponse, json_response


class Routes:
    """The handlers of all routes."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def table(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/health", self._health, methods=["GET"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]

    async def _health(self, request: Request) -> Response:  # noqa: ARG002 - a route's argument
        return Response(status_code=200 if self._service.is_ready else 503)

    async def _models(self, request: Request) -> Response:  # noqa: ARG002 - a route's argument
        return json_response({"object": "list", "data": [self._model_entry()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._service.model_name:
            message = f"the model {name[:200]!r} is not served here: {self._service.model_name!r} is"
            raise ApiError(404, "not_found_error", message, param="model", code="model_not_found")
        return json_response(self._model_entry())

    def _model_entry(self) -> dict[str, Any]:
        entry = {"id": self._service.model_name, "object": "model", "created": self._service.created}
        entry |= {"owned_by": "mlx-k2"}
        context_tokens = self._service.context_tokens
        return entry if context_tokens is None else entry | {"max_model_len": context_tokens}

    async def _chat(self, request: Request) -> ASGIApp:
        engine, model = self._service.ready()
        body = await read_body(request)
        chat, generation = await asyncio.to_thread(self._prepare_chat, body, model)
        stream = EventStream()
        try:
            await stream.submit(engine, generation)
        except MlxK2Error as error:
            raise from_program(error) from None
        reply = ChatReply(generation)
        chat_format = ChatFormat(
            id=f"chatcmpl-{request.scope[REQUEST_ID]}",
            created=int(time.time()),
            model=model.name,
            tokenizer=model.tokenizer,
            mirrors_reasoning=self._service.options.mirrors_reasoning,
            wants_logprobs=bool(chat.logprobs),
        )
        headers = _model_headers(chat, model)
        return (
            self._streamed(chat, chat_format, reply, stream, headers)
            if chat.stream
            else _complete(chat_format, reply, stream, headers)
        )

    def _prepare_chat(self, body: bytes, model: ServedModel) -> tuple[ChatRequest, Generation]:
        """Read, render and tokenize, on a worker thread."""
        chat = read_chat_request(body)
        self._service.check_model(chat.model)
        try:
            return chat, model.chat(chat)
        except MlxK2Error as error:
            raise from_program(error) from None

    def _streamed(
        self,
        chat: ChatRequest,
        chat_format: ChatFormat,
        reply: ChatReply,
        stream: EventStream,
        headers: dict[str, str],
    ) -> ASGIApp:
        options = self._service.options
        frames = ChatFrames(
            chat_format,
            reply,
            include_usage=bool(chat.stream_options and chat.stream_options.include_usage),
            return_progress=bool(chat.return_progress),
            keepalive=options.keepalive,
        )
        return EventStreamResponse(stream, frames, headers, options.keepalive_s)


def _complete(chat_format: ChatFormat, reply: ChatReply, stream: EventStream, headers: dict[str, str]) -> ASGIApp:
    last: list[Finished] = []

    def add(event: Event) -> None:
        reply.add(event)
        if isinstance(event, Finished):
            last.append(event)

    return CompleteResponse(stream, add, lambda: chat_body(chat_format, reply, last[0].summary), headers)


def _model_headers(chat: ChatRequest, model: ServedModel) -> dict[str, str]:
    """Return a warning for a request that names another model."""
    if chat.model in (None, model.name):
        return {}
    return {"warning": '299 mlx-k2 "another model was asked for; the answer is from the one that is served"'}
