"""The body of POST /v1/responses, and its conversion to a chat request. Knows no model."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from mlx_k2.server.api_errors import ApiError
from mlx_k2.server.chat_request import ChatRequest, check_chat
from mlx_k2.server.request_fields import GenerationFields, check_field, read_fields
from mlx_k2.server.responses_input import InputReader

LOGPROBS = "message.output_text.logprobs"
"""The value of ``include`` that asks for log-probabilities."""
_TOOL_FIELDS = ("name", "description", "parameters", "strict")
_FIELD_NAMES = {
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "max_completion_tokens": "max_output_tokens",
    "tools": "tools",  # without the index, which counts functions only
}
"""Fields of a chat request whose name or index differs in the responses request that it was made of."""


class ReasoningOptions(msgspec.Struct, frozen=True):
    """How much the model thinks. ``summary`` has no effect: the reasoning itself is sent."""

    effort: str | None = None
    summary: str | None = None


class TextOptions(msgspec.Struct, frozen=True):
    """The format of the answer text. ``verbosity`` has no effect."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(GenerationFields, frozen=True, kw_only=True):
    """The fields of ``POST /v1/responses`` that are read. Unknown fields are ignored."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None

    @property
    def is_stored(self) -> bool:
        """Whether the response is stored for GET and for ``previous_response_id``."""
        return self.store is not False

    @property
    def function_tools(self) -> list[dict[str, Any]]:
        """The declared functions. Tools of other types are left out: OpenAI's API defines them."""
        return [tool for tool in self.tools or () if tool.get("type") == "function"]


class Conversation(msgspec.Struct, frozen=True):
    """A request for a response, converted to a chat request; ``warnings`` are lines about what was left out.

    A later response continues ``messages``. They lack the instructions, which apply to one response only.
    """

    chat: ChatRequest
    messages: list[dict[str, Any]]
    warnings: tuple[str, ...]


def read_responses_request(body: bytes) -> ResponsesRequest:
    """Return the fields of a request.

    Raises:
        ApiError: 400; names the field that is malformed, or asks for something that this server does not do.
    """
    request = read_fields(body, ResponsesRequest)
    check_field(not request.background, "background", "a response in the background is not supported: leave it out")
    check_field(request.conversation is None, "conversation", "conversations are not stored: use previous_response_id")
    check_field(request.prompt is None, "prompt", "prompt templates are not stored: send their text as instructions")
    check_field(request.n in (None, 1), "n", "a response is one answer: leave n out")
    for index, tool in enumerate(request.tools or ()):
        has_name = isinstance(tool.get("name"), str) and bool(tool["name"])
        message = f"tools[{index}] is a function without a name"
        check_field(tool.get("type") != "function" or has_name, f"tools[{index}].name", message)
    return request


def conversation_of(request: ResponsesRequest, previous: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    """Return the conversation to answer: the messages ``previous``, then the input.

    Raises:
        ApiError: 400; names the field that cannot be used.
    """
    reader = InputReader()
    items = [{"role": "user", "content": request.input}] if isinstance(request.input, str) else request.input
    reader.read(items)
    messages = [*map(dict, previous), *reader.messages]
    instructions = [] if request.instructions is None else [{"role": "system", "content": request.instructions}]
    tools, choice = _tools_and_choice(request)
    common_fields = {name: getattr(request, name) for name in GenerationFields.__struct_fields__}
    wants_logprobs = bool(request.top_logprobs) or LOGPROBS in (request.include or ())
    chat = ChatRequest(
        **common_fields | {"response_format": _response_format(request)},
        messages=[*instructions, *messages],
        max_completion_tokens=request.max_output_tokens,
        logprobs=wants_logprobs,
        top_logprobs=request.top_logprobs,
        tools=tools or None,
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
    )
    check_chat(chat)
    skipped_tools = {str(tool.get("type")) for tool in request.tools or ()} - {"function"}
    warnings = [f"tools of these types are left out: {', '.join(sorted(skipped_tools))}"] if skipped_tools else []
    if reader.skipped_types:
        warnings.append(f"input items of these types are left out: {', '.join(sorted(reader.skipped_types))}")
    return Conversation(chat, messages, tuple(warnings))


def in_responses_words(error: ApiError) -> ApiError:
    """Return an error about a chat request with the field names of a responses request."""
    name = (error.param or "").split("[", 1)[0].split(".", 1)[0]
    if name in _FIELD_NAMES:
        error.param = _FIELD_NAMES[name]
        error.message = re.sub(rf"{name}(\[\d+\])?", error.param, error.message)
    return error


def _response_format(request: ResponsesRequest) -> dict[str, Any] | None:
    """Return the format of the answer text as the ``response_format`` of chat completions; None allows any text."""
    given = request.response_format if request.text is None or request.text.format is None else request.text.format
    if given is None or given.get("type") != "json_schema" or "json_schema" in given:
        return given
    return {"type": "json_schema", "json_schema": {name: given[name] for name in ("schema", "strict") if name in given}}


def _tools_and_choice(request: ResponsesRequest) -> tuple[list[dict[str, Any]], str | dict[str, Any] | None]:
    """Return ``tools`` and ``tool_choice`` as chat completions have them.

    Raises:
        ApiError: 400, the choice is malformed, or names a tool that is not a function.
    """
    tools, choice = request.function_tools, request.tool_choice
    if isinstance(choice, dict):
        kind = choice.get("type")
        if kind == "allowed_tools":
            allowed = choice.get("tools")
            check_field(isinstance(allowed, list), "tool_choice.tools", "tool_choice.tools must be a list of tools")
            all_names = (tool.get("name") for tool in allowed or () if isinstance(tool, Mapping))
            allowed_names = {name for name in all_names if isinstance(name, str)}
            tools = [tool for tool in tools if tool["name"] in allowed_names]
            choice = choice.get("mode", "auto")
        else:
            check_field(kind == "function", "tool_choice", f"tool_choice {kind!r} cannot be used: name a function")
            choice = {"type": "function", "function": {"name": choice.get("name")}}
    functions = [{name: tool[name] for name in _TOOL_FIELDS if tool.get(name) is not None} for tool in tools]
    return [{"type": "function", "function": function} for function in functions], choice
