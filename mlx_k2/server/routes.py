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
from mlx_k2.server.openapi import openapi_document
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
    CompleteResponse,
    EventStreamResponse,
    ReplyFormat,
    json_response,
    status_events,
)
from mlx_k2.server.turn_store import TURN_HANDLE_FIELD, ResponseStore, StoredResponse

Result = TypeVar("Result")
ApiRequest = TypeVar("ApiRequest", bound=GenerationFields | MessagesRequest)
_MAX_EVENT_ID_DIGITS = 16
"""Longer numbers in last-event-id are ignored: the server has not sent them."""
COUNTS_PER_S = 50
"""The most requests to count_tokens per second and key. Claude Code in an editor sends 40 at its start."""
_MAX_PREPARING = 4
"""The most requests that are parsed and tokenized at the same time, each on a worker thread."""
_CHAT_PREFIX, _TEXT_PREFIX, _MESSAGE_PREFIX, _RESPONSE_PREFIX = "chatcmpl-", "cmpl-", "msg_", "resp_"
_OTHER_MODEL_WARNING = "another model was asked for; the answer is from the one that is served"
_MAX_WARNINGS, _MAX_WARNING_CHARS = 8, 300


class Routes:
    """The handlers of all routes."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._options = state.options
        self._preparing = asyncio.Semaphore(_MAX_PREPARING)
        self._count_limit = RateLimit(COUNTS_PER_S)
        self._responses = ResponseStore()

    def table(self) -> list[Route]:
        """Return each path and method with its handler."""
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

    # ---- status of the server and its model

    async def _health(self, request: Request) -> Response:  # noqa: ARG002 - a route's argument
        return Response(status_code=200 if self._state.name == "ready" else 503)

    async def _metrics(self, request: Request) -> Response:  # noqa: ARG002 - a route's argument
        return Response(self._state.metrics.text(), media_type=CONTENT_TYPE)

    async def _openapi(self, request: Request) -> Response:  # noqa: ARG002 - a route's argument
        return json_response(openapi_document())

    async def _status(self, request: Request) -> Response:
        status = self._state.status(request.scope[OWNER])
        return json_response(status | {"history": self._state.activity.history()})

    async def _status_events(self, request: Request) -> Response:
        if request.method == "HEAD":  # each route for GET also gets HEAD; the stream would never end
            return Response(headers=STREAM_HEADERS)
        owner = request.scope[OWNER]
        last_id = request.headers.get("last-event-id", "")
        is_number = last_id.isascii() and last_id.isdigit() and len(last_id) <= _MAX_EVENT_ID_DIGITS
        events = status_events(
            lambda: self._state.status(owner), lambda: self._state.is_ending, int(last_id) if is_number else 0
        )
        return StreamingResponse(events, headers=STREAM_HEADERS)

    async def _models(self, request: Request) -> Response:  # noqa: ARG002 - a route's argument
        """Answer with the fields of OpenAI's list of models and of Anthropic's."""
        page_fields = {"has_more": False, "first_id": self._state.model_name, "last_id": self._state.model_name}
        return json_response({"object": "list", **page_fields, "data": [self._model_entry()]})

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
        id_of_answer = request_id = request.path_params["id"]
        for prefix in (_CHAT_PREFIX, _TEXT_PREFIX, _MESSAGE_PREFIX, _RESPONSE_PREFIX):
            request_id = request_id.removeprefix(prefix)
        self._state.cancel(request_id, request.scope[OWNER])
        return json_response({"id": id_of_answer, "cancelled": True})

    # ---- counting and conversion of tokens

    async def _tokenize(self, request: Request) -> Response:
        def tokenize(model: LanguageModel, body: bytes) -> list[int]:
            fields = read_fields(body, TokenizeRequest)
            text = fields.content if fields.prompt is None else fields.prompt
            if text is not None:
                return model.tokenizer.encode_text(text)
            if fields.messages is None:
                raise bad_request_error("give a text as prompt, or messages", "prompt")
            return model.chat_prompt(read_chat_request(body), request.scope[OWNER])[0]

        tokens = await self._prepare(request, tokenize)
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": self._state.context_tokens})

    async def _count_tokens(self, request: Request) -> Response:
        owner = request.scope[OWNER]
        self._count_limit.check(owner)
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
            lambda chat, replies: ChatFormat(self._base_fields(_CHAT_PREFIX, request), replies, chat, self._options),
        )

    async def _messages(self, request: Request) -> ASGIApp:
        return await self._generate(
            request,
            lambda body: read_fields(body, MessagesRequest),
            lambda model, messages: model.chat(messages.chat, request.scope[OWNER]),
            lambda messages, replies: MessagesFormat(
                request.scope[REQUEST_ID], self._state.model_name, messages, replies[0]
            ),
        )

    async def _completions(self, request: Request) -> ASGIApp:
        return await self._generate(
            request,
            read_completion_request,
            LanguageModel.completion,
            lambda text, replies: TextFormat(self._base_fields(_TEXT_PREFIX, request), replies, text, self._options),
        )

    async def _generate(
        self,
        request: Request,
        parse: Callable[[bytes], ApiRequest],
        generation_of: Callable[[LanguageModel, ApiRequest], Generation],
        make_format: Callable[[ApiRequest, Sequence[ChatReply]], ReplyFormat],
    ) -> ASGIApp:
        """Answer a request for generated text. ``parse`` and ``generation_of`` are called on a worker thread."""

        def prepare(model: LanguageModel, body: bytes) -> tuple[ApiRequest, Generation]:
            api_request = parse(body)
            self._state.check_model(api_request.model)
            return api_request, generation_of(model, api_request)

        self._state.check_ready()
        api_request, generation = await self._prepare(request, prepare, is_queued=True)
        replies = [ChatReply(generation, self._keep_turn) for _ in generation.submissions]
        return await self._submit(request, api_request, generation, make_format(api_request, replies))

    # ---- Responses API

    async def _respond(self, request: Request) -> ASGIApp:
        """Answer a request of the Responses API. A streamed answer reports a prompt that does not fit as an event."""
        owner = request.scope[OWNER]

        def prepare(model: LanguageModel, body: bytes) -> tuple[ResponsesRequest, bytes, Generation | ApiError]:
            api_request = read_responses_request(body)
            self._state.check_model(api_request.model)
            try:
                conversation = conversation_of(api_request, self._previous_conversation(owner, api_request))
                generation = model.chat(conversation.chat, owner)
            except ApiError as error:
                if not api_request.stream or error.code != CONTEXT_OVERFLOW:
                    raise in_responses_words(error) from None
                return api_request, b"", in_responses_words(error)
            messages = msgspec.json.encode(conversation.messages) if api_request.is_stored else b""
            generation = replace(generation, warnings=(*conversation.warnings, *generation.warnings))
            return api_request, messages, generation

        self._state.check_ready()
        api_request, messages, generation = await self._prepare(request, prepare, is_queued=True)
        base_fields = self._base_fields(_RESPONSE_PREFIX, request)
        if isinstance(generation, ApiError):
            stream = failed_stream(response_fields(base_fields, api_request, None), generation)
            return Response(stream, headers=STREAM_HEADERS)
        reply = ChatReply(generation, self._keep_turn)

        def keep_response(body: bytes) -> None:
            if api_request.is_stored:
                answer = msgspec.json.encode(reply.message.json_value() | {TURN_HANDLE_FIELD: reply.turn_handle})
                self._responses.keep(owner, base_fields["id"], StoredResponse(body, messages, answer))

        fields = response_fields(base_fields, api_request, generation.submissions[0].request.sampling)
        response_format = ResponseFormat(fields, reply, self._options.keepalive, keep_response)
        return await self._submit(request, api_request, generation, response_format)

    async def _response(self, request: Request) -> Response:
        response = self._responses.find(request.scope[OWNER], request.path_params["id"])
        if response is None:
            raise _response_not_found()
        return Response(response.body, media_type="application/json")

    async def _delete_response(self, request: Request) -> Response:
        response_id = request.path_params["id"]
        if not self._responses.delete(request.scope[OWNER], response_id):
            raise _response_not_found()
        return json_response({"id": response_id, "object": "response", "deleted": True})

    def _previous_conversation(self, owner: str, api_request: ResponsesRequest) -> list[dict[str, Any]]:
        """Return the messages that a request continues; [] for none. Raise ApiError if their response is not stored."""
        if api_request.previous_response_id is None:
            return []
        response = self._responses.find(owner, api_request.previous_response_id)
        if response is None:
            message = "the previous response is not stored: send the whole conversation as input"
            raise bad_request_error(message, "previous_response_id", "previous_response_not_found")
        return response.conversation

    async def _prepare(
        self, request: Request, compute: Callable[[LanguageModel, bytes], Result], *, is_queued: bool = False
    ) -> Result:
        """Read the body, and return the result of ``compute`` for the model and the body, on a worker thread.

        Raises:
            ApiError: the request is refused; each MlxK2Error of ``compute`` becomes an ApiError.
        """
        model = self._state.model()
        with self._state.preparing(is_queued=is_queued):
            body = await read_body(request)
            try:
                async with self._preparing:
                    return await asyncio.to_thread(compute, model, body)
            except MlxK2Error as error:
                raise to_api_error(error) from None

    def _keep_turn(self, reply: ChatReply) -> None:
        """Store a complete reply, so that the prompt of the client's next request has its tokens."""
        self._state.model().keep_turn(reply.generation, reply.turn_handle, reply.message, reply.token_ids)

    def _base_fields(self, prefix: str, request: Request) -> dict[str, Any]:
        """Return the fields of a body that are known before its answer: id, creation time and model."""
        return {
            "id": prefix + request.scope[REQUEST_ID],
            "created": int(time.time()),
            "model": self._state.model_name,
        }

    async def _submit(
        self, request: Request, api_request: ApiRequest, generation: Generation, reply_format: ReplyFormat
    ) -> ASGIApp:
        """Submit the generation to the engine; return the response that sends its answer in ``reply_format``."""
        warnings = [_OTHER_MODEL_WARNING] if api_request.model not in (None, self._state.model_name) else []
        headers = warning_headers([*warnings, *generation.warnings])
        stream = await self._state.open(request.scope[REQUEST_ID], request.scope[OWNER], generation)
        if api_request.stream:
            return EventStreamResponse(stream, reply_format, headers, self._options.keepalive_s)
        return CompleteResponse(stream, reply_format, headers)


def _response_not_found() -> ApiError:
    return ApiError(404, "not_found_error", "no such response is stored", code="response_not_found")


def warning_headers(warnings: Sequence[str]) -> dict[str, str]:
    """Return the header "warning" in printable ASCII, with the first _MAX_WARNINGS warnings; {} for none.

    Each warning is cut to _MAX_WARNING_CHARS. 299 is HTTP's code of a warning that has no other code.
    """
    texts = [re.sub(r'[^ -~]|["\\]', "?", warning[:_MAX_WARNING_CHARS]) for warning in warnings[:_MAX_WARNINGS]]
    return {"warning": ", ".join(f'299 mlx-k2 "{text}"' for text in texts)} if texts else {}
