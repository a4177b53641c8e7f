"""The body of POST /v1/responses, and the chat request that it means. Knows no model."""

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
_PARAMS = {
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "max_completion_tokens": "max_output_tokens",
    "tools": "tools",
}
"""The fields of a response for those of the chat request that it becomes."""


class ReasoningOptions(msgspec.Struct, frozen=True):
    """How much the model thinks. ``summary`` changes nothing: reasoning is sent as it is."""

    effort: str | None = None
    summary: str | None = None


class TextOptions(msgspec.Struct, frozen=True):
    """The form of the answer. ``verbosity`` changes nothing."""

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
        """Whether the response is kept, for GET and for ``previous_response_id``."""
        return self.store is not False

    @property
    def function_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call. Tools of other types would run on a server, and are left out."""
        return [tool for tool in self.tools or () if tool.get("type") == "function"]


class Conversation(msgspec.Struct, frozen=True):
    """The chat request that a request for a response means, and lines about what was left out.

    ``messages`` are those that a later response continues: all but the instructions, which hold for one response.
    """

    chat: ChatRequest
    messages: list[dict[str, Any]]
    warnings: tuple[str, ...]


def read_responses_request(body: bytes) -> ResponsesRequest:
    """Return the fields of a request.

    Raises:
        ApiError: 400; names the field that is malformed, or asks for something that this server does not do.
    """
    asked = read_fields(body, ResponsesRequest)
    check_field(not asked.background, "background", "a response in the background is not supported: leave it out")
    check_field(asked.conversation is None, "conversation", "conversations are not stored: use previous_response_id")
    check_field(asked.prompt is None, "prompt", "prompt templates are not stored: send their text as instructions")
    check_field(asked.n in (None, 1), "n", "a response is one answer: leave n out")
    for at, tool in enumerate(asked.tools or ()):
        is_named = isinstance(tool.get("name"), str) and bool(tool["name"])
        check_field(
            tool.get("type") != "function" or is_named, f"tools[{at}].name", f"tools[{at}] is a function without a name"
        )
    return asked


def conversation_of(asked: ResponsesRequest, earlier: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    """Return the conversation to answer, which continues the messages ``earlier``.

    Raises:
        ApiError: 400; names the field.
    """
    reader = InputReader()
    given = [{"role": "user", "content": asked.input}] if isinstance(asked.input, str) else asked.input
    reader.read(given)
    messages = [*map(dict, earlier), *reader.messages]
    instructions = [] if asked.instructions is None else [{"role": "system", "content": asked.instructions}]
    tools, choice = _tools_and_choice(asked)
    shared = {name: getattr(asked, name) for name in GenerationFields.__struct_fields__}
    wants_logprobs = bool(asked.top_logprobs) or LOGPROBS in (asked.include or ())
    chat = ChatRequest(
        **shared | {"response_format": _response_format(asked), "stream_options": None},
        messages=[*instructions, *messages],
        max_completion_tokens=asked.max_output_tokens,
        logprobs=wants_logprobs,
        top_logprobs=asked.top_logprobs,
        tools=tools or None,
        tool_choice=choice,
        parallel_tool_calls=asked.parallel_tool_calls,
        reasoning_effort=None if asked.reasoning is None else asked.reasoning.effort,
    )
    check_chat(chat)
    left_out = {str(tool.get("type")) for tool in asked.tools or ()} - {"function"}
    warnings = [f"tools of these types are left out: {', '.join(sorted(left_out))}"] if left_out else []
    if reader.skipped:
        warnings.append(f"input items of these types are left out: {', '.join(sorted(reader.skipped))}")
    return Conversation(chat, messages, tuple(warnings))


def in_responses_words(error: ApiError) -> ApiError:
    """Return an error about a chat request with the names that its fields have here."""
    name = (error.param or "").split("[", 1)[0].split(".", 1)[0]
    if name in _PARAMS:
        error.param = _PARAMS[name]
        error.message = re.sub(rf"{name}(\[\d+\])?", _PARAMS[name], error.message)
    return error


def _response_format(asked: ResponsesRequest) -> dict[str, Any] | None:
    """Return the form of the answer as chat completions write it."""
    form = asked.response_format if asked.text is None or asked.text.format is None else asked.text.format
    if form is None or form.get("type") != "json_schema" or "json_schema" in form:
        return form
    return {"type": "json_schema", "json_schema": {name: form[name] for name in ("schema", "strict") if name in form}}


def _tools_and_choice(asked: ResponsesRequest) -> tuple[list[dict[str, Any]], str | dict[str, Any] | None]:
    """Return the tools and the choice as chat completions write them.

    Raises:
        ApiError: 400, the choice is a tool that runs on a server.
    """
    tools, choice = asked.function_tools, asked.tool_choice
    if isinstance(choice, dict):
        kind = choice.get("type")
        if kind == "allowed_tools":
            allowed = choice.get("tools")
            check_field(isinstance(allowed, list), "tool_choice.tools", "tool_choice.tools must be a list of tools")
            found = [tool.get("name") for tool in allowed or () if isinstance(tool, Mapping)]
            names = {name for name in found if isinstance(name, str)}
            tools, choice = [tool for tool in tools if tool["name"] in names], choice.get("mode", "auto")
        else:
            check_field(kind == "function", "tool_choice", f"tool_choice {kind!r} cannot be used: name a function")
            choice = {"type": "function", "function": {"name": choice.get("name")}}
    declared = [{name: tool[name] for name in _TOOL_FIELDS if tool.get(name) is not None} for tool in tools]
    return [{"type": "function", "function": function} for function in declared], choice
