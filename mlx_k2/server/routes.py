"""The routes of the server. Knows HTTP and the APIs' formats, but no stages."""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from mlx_k2.errors import MlxK2Error
from mlx_k2.server.access import RateLimit
from mlx_k2.server.api_errors import CONTEXT_OVERFLOW, OWNER, REQUEST_ID, ApiError, bad_request_error, to_api_error
from mlx_k2.server.chat_completions import ChatFormat, TextFormat
from mlx_k2.server.chat_reply import ChatReply
from mlx_k2.server.chat_request import (
    DetokenizeRequest,
    TokenizeRequest,
    read_chat_request,
    read_completion_request,
)
from mlx_k2.server.language_model import Generation, LanguageModel
from mlx_k2.server.messages_format import MessagesFormat
from mlx_k2.server.messages_request import CountRequest, MessagesRequest
from mlx_k2.server.metrics import CONTENT_TYPE
from mlx_k2.server.openapi import document
from mlx_k2.server.request_fields import GenerationFields, read_body, read_fields
from mlx_k2.server.responses_format import ResponseFormat, failed_stream, response_fields
from mlx_k2.server.responses_request import (
    ResponsesRequest,
    conversation_of,
    in_responses_words,
    read_responses_request,
)
from mlx_k2.server.server_state import ServerState
from mlx_k2.server.sse import (
    STREAM_HEADERS,
    EventStreamResponse,
    ReplyFormat,
    WholeResponse,
    json_response,
    status_events,
)
from mlx_k2.server.turn_store import HANDLE_FIELD, ResponseStore, StoredResponse

Result = TypeVar("Result")
Asked = TypeVar("Asked", bound=GenerationFields | MessagesRequest)
_MAX_ID_DIGITS = 16
COUNTS_PER_S = 50
"""The most requests of a key for a number of tokens. Claude Code in an editor sends 40 at its start."""
_MAX_PREPARING = 4
"""The most requests whose prompts are made at once, each on a worker thread."""
_CHAT_PREFIX, _TEXT_PREFIX, _MESSAGE_PREFIX, _RESPONSE_PREFIX = "chatcmpl-", "cmpl-", "msg_", "resp_"
_OTHER_MODEL = "another model was asked for; the answer is from the one that is served"
_MAX_WARNINGS, _MAX_WARNING_SIZE = 8, 300


class Routes:
    """The handlers of all routes."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._workers = asyncio.Semaphore(_MAX_PREPARING)
        self._counting = RateLimit(COUNTS_PER_S)
        self._responses = ResponseStore()

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
            Route("/v1/messages", self._messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", self._count_tokens, methods=["POST"]),
            Route("/v1/responses", self._respond, methods=["POST"]),
            Route("/v1/responses/{id}", self._response, methods=["GET"]),
            Route("/v1/responses/{id}", self._delete_response, methods=["DELETE"]),
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

    async def _status_events(self, request: Request) -> Response:
        if request.method == "HEAD":
            return Response(headers=STREAM_HEADERS)
        owner = request.scope[OWNER]
        seen = request.headers.get("last-event-id", "")
        last_id = int(seen) if seen.isascii() and seen.isdigit() and len(seen) < _MAX_ID_DIGITS else 0
        events = status_events(lambda: self._state.status(owner), lambda: self._state.is_ending, last_id)
        return StreamingResponse(events, headers=STREAM_HEADERS)

    async def _models(self, request: Request) -> Response:  # noqa: ARG002 - a route's argument
        """Answer in the shapes of both OpenAI's and Anthropic's API."""
        pages = {"has_more": False, "first_id": self._state.model_name, "last_id": self._state.model_name}
        return json_response({"object": "list", **pages, "data": [self._model_entry()]})

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
            "type": "model",
            "display_name": self._state.model_name,
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._state.created)),
            "max_model_len": self._state.context_tokens,
        }

    async def _cancel(self, request: Request) -> Response:
        written = request_id = request.path_params["id"]
        for prefix in (_CHAT_PREFIX, _TEXT_PREFIX, _MESSAGE_PREFIX, _RESPONSE_PREFIX):
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

    async def _count_tokens(self, request: Request) -> Response:
        owner = request.scope[OWNER]
        self._counting.check(owner)
        prompt_ids, _ = await self._prepare(
            request, lambda model, body: model.chat_prompt(read_fields(body, CountRequest).chat, owner)
        )
        return json_response({"input_tokens": len(prompt_ids)})

    async def _detokenize(self, request: Request) -> Response:
        text = await self._prepare(
            request, lambda model, body: model.text_of(read_fields(body, DetokenizeRequest).tokens)
        )
        return json_response({"prompt": text})

    # ---- generation

    async def _chat(self, request: Request) -> ASGIApp:
        return await self._generate(
            request,
            read_chat_request,
            lambda model, chat: model.chat(chat, request.scope[OWNER]),
            lambda chat, replies: ChatFormat(self._head(_CHAT_PREFIX, request), replies, chat, self._state.options),
        )

    async def _messages(self, request: Request) -> ASGIApp:
        return await self._generate(
            request,
            lambda body: read_fields(body, MessagesRequest),
            lambda model, asked: model.chat(asked.chat, request.scope[OWNER]),
            lambda asked, replies: MessagesFormat(request.scope[REQUEST_ID], self._state.model_name, asked, replies[0]),
        )

    async def _completions(self, request: Request) -> ASGIApp:
        return await self._generate(
            request,
            read_completion_request,
            LanguageModel.completion,
            lambda asked, replies: TextFormat(self._head(_TEXT_PREFIX, request), replies, asked, self._state.options),
        )

    async def _generate(
        self,
        request: Request,
        read: Callable[[bytes], Asked],
        generation_of: Callable[[LanguageModel, Asked], Generation],
        make_format: Callable[[Asked, Sequence[ChatReply]], ReplyFormat],
    ) -> ASGIApp:
        """Answer a request of an API. ``read`` and ``generation_of`` are called on a worker thread."""

        def prepare(model: LanguageModel, body: bytes) -> tuple[Asked, Generation]:
            asked = read(body)
            self._state.check_model(asked.model)
            return asked, generation_of(model, asked)

        self._state.check_ready()
        asked, generation = await self._prepare(request, prepare, is_queued=True)
        replies = [ChatReply(generation, self._keep_turn) for _ in generation.submissions]
        return await self._answer(request, asked, generation, make_format(asked, replies))

    # ---- responses

    async def _respond(self, request: Request) -> ASGIApp:
        """Answer a request of the Responses API. If it is streamed and does not fit, the answer is events as well."""
        owner = request.scope[OWNER]

        def prepare(model: LanguageModel, body: bytes) -> tuple[ResponsesRequest, bytes, Generation | ApiError]:
            asked = read_responses_request(body)
            self._state.check_model(asked.model)
            try:
                conversation = conversation_of(asked, self._earlier(owner, asked))
                generation = model.chat(conversation.chat, owner)
            except ApiError as error:
                if not asked.stream or error.code != CONTEXT_OVERFLOW:
                    raise in_responses_words(error) from None
                return asked, b"", in_responses_words(error)
            messages = msgspec.json.encode(conversation.messages) if asked.is_stored else b""
            return asked, messages, replace(generation, warnings=(*conversation.warnings, *generation.warnings))

        self._state.check_ready()
        asked, messages, generation = await self._prepare(request, prepare, is_queued=True)
        head = self._head(_RESPONSE_PREFIX, request)
        if isinstance(generation, ApiError):
            return Response(failed_stream(response_fields(head, asked, None), generation), headers=STREAM_HEADERS)
        reply = ChatReply(generation, self._keep_turn)

        def keep(body: bytes) -> None:
            if asked.is_stored:
                answer = msgspec.json.encode(reply.message.json_value() | {HANDLE_FIELD: reply.handle})
                self._responses.keep(owner, head["id"], StoredResponse(body, messages, answer))

        fields = response_fields(head, asked, generation.submissions[0].request.sampling)
        form = ResponseFormat(fields, reply, self._state.options.keepalive, keep)
        return await self._answer(request, asked, generation, form)

    async def _response(self, request: Request) -> Response:
        found = self._responses.find(request.scope[OWNER], request.path_params["id"])
        if found is None:
            raise _no_response()
        return Response(found.body, media_type="application/json")

    async def _delete_response(self, request: Request) -> Response:
        response_id = request.path_params["id"]
        if not self._responses.delete(request.scope[OWNER], response_id):
            raise _no_response()
        return json_response({"id": response_id, "object": "response", "deleted": True})

    def _earlier(self, owner: str, asked: ResponsesRequest) -> list[dict[str, Any]]:
        """Return the conversation that a request continues."""
        if asked.previous_response_id is None:
            return []
        found = self._responses.find(owner, asked.previous_response_id)
        if found is None:
            message = "the previous response is not stored: send the whole conversation as input"
            raise bad_request_error(message, "previous_response_id", "previous_response_not_found")
        return found.conversation

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

    def _keep_turn(self, reply: ChatReply) -> None:
        """Store a complete reply for the client's next request."""
        self._state.model().keep_turn(reply.generation, reply.handle, reply.message, reply.token_ids)

    def _head(self, prefix: str, request: Request) -> dict[str, Any]:
        return {
            "id": prefix + request.scope[REQUEST_ID],
            "created": int(time.time()),
            "model": self._state.model_name,
        }

    async def _answer(self, request: Request, asked: Asked, generation: Generation, form: ReplyFormat) -> ASGIApp:
        """Submit the request and return its answer."""
        warnings = [_OTHER_MODEL] if asked.model not in (None, self._state.model_name) else []
        headers = warning_headers([*warnings, *generation.warnings])
        stream = await self._state.open(request.scope[REQUEST_ID], request.scope[OWNER], generation)
        if asked.stream:
            return EventStreamResponse(stream, form, headers, self._state.options.keepalive_s)
        return WholeResponse(stream, form, headers)


def _no_response() -> ApiError:
    return ApiError(404, "not_found_error", "no such response is stored", code="response_not_found")


def warning_headers(warnings: Sequence[str]) -> dict[str, str]:
    """Return a header with ``warnings``, in the characters that a header may have."""
    texts = [re.sub(r'[^ -~]|["\\]', "?", warning[:_MAX_WARNING_SIZE]) for warning in warnings[:_MAX_WARNINGS]]
    return {"warning": ", ".join(f'299 mlx-k2 "{text}"' for text in texts)} if texts else {}
