"""The body of a chat completion, and which of its values this server can serve. Knows no model."""

from collections.abc import Mapping
from typing import Any

import msgspec

from mlx_k2.json_text.parse import JsonError, parse_json
from mlx_k2.json_text.read import convert
from mlx_k2.server.api_errors import invalid

MAX_TOOLS = 512
MAX_STOP_STRINGS = 16
MAX_TOP_LOGPROBS = 20
EFFORT_TOKENS = {"none": 0, "minimal": 512, "low": 2048, "medium": 8192, "high": 32768, "xhigh": None, "max": None}
"""The thinking budget of each ``reasoning_effort``; None sets no limit."""
_TEXT_PARTS = ("text", "input_text", "output_text")


class StreamOptions(msgspec.Struct, frozen=True):
    """Options of a streamed answer."""

    include_usage: bool | None = None


class Thinking(msgspec.Struct, frozen=True):
    """Moonshot's and Anthropic's field ``thinking``. ``keep`` "all" keeps the reasoning of earlier answers."""

    type: str | None = None
    keep: Any = None
    budget_tokens: int | None = None


class TemplateOptions(msgspec.Struct, frozen=True):
    """The only variables that a client may set for the chat template."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    preserve_thinking: bool | None = None


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of ``POST /v1/chat/completions`` that are read. Unknown fields are ignored."""

    messages: list[dict[str, Any]]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None
    return_progress: bool | None = None
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    functions: Any = None
    function_call: Any = None
    extra_body: Any = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit_tokens(self) -> int | None:
        """The most tokens of the answer, reasoning included; None: what fits."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_thinking(self) -> bool | None:
        """Whether the model thinks before it answers; None is the model's default."""
        if self.chat_template_kwargs is not None:
            chosen = (self.chat_template_kwargs.thinking, self.chat_template_kwargs.enable_thinking)
            if any(one is not None for one in chosen):
                return next(one for one in chosen if one is not None)
        if self.thinking is not None and self.thinking.type is not None:
            return self.thinking.type != "disabled"
        return None if self.reasoning_effort is None else self.reasoning_effort != "none"

    @property
    def preserves_thinking(self) -> bool:
        """Whether the reasoning of earlier answers stays in the prompt."""
        asked = self.chat_template_kwargs is not None and self.chat_template_kwargs.preserve_thinking
        return bool(asked) or (self.thinking is not None and self.thinking.keep == "all")

    @property
    def thinking_budget(self) -> int | None:
        """The most tokens of reasoning; None sets no limit."""
        if self.thinking is not None and self.thinking.budget_tokens is not None:
            return max(0, self.thinking.budget_tokens)
        effort = self.reasoning_effort
        return None if effort is None or effort == "none" else EFFORT_TOKENS[effort]


def read_chat_request(body: bytes) -> ChatRequest:
    """Return a checked chat request.

    Raises:
        ApiError: 400; names the field that is malformed, or asks for something that this server does not do.
    """
    try:
        value = parse_json(body)
    except JsonError as error:
        raise invalid(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object")
    try:
        chat = convert(value, ChatRequest)
    except JsonError as error:
        field, _, problem = str(error).partition(": ")
        raise invalid(str(error), field if problem and field != "the whole" else None) from None
    _check(chat)
    return chat


def _check(chat: ChatRequest) -> None:
    """Refuse what cannot be done. Nothing that changes an answer is ignored silently."""
    _demand(chat.n in (None, 1), "n", "this server makes one choice: leave n out, or give 1")
    for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
        _demand(not getattr(chat, name), name, f"{name} is not supported: leave it out")
    _demand(chat.extra_body is None, "extra_body", "extra_body is an argument of OpenAI's client: send its fields")
    for name in ("functions", "function_call"):
        _demand(getattr(chat, name) is None, name, f"{name} is deprecated: use tools and tool_choice")
    kind = None if chat.response_format is None else chat.response_format.get("type")
    _demand(kind in (None, "text"), "response_format", f"response_format {kind!r} is not supported: leave it out")
    _demand(set(chat.modalities or ()) <= {"text"}, "modalities", "this model writes text only")
    limit = chat.limit_tokens
    name = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
    _demand(limit is None or limit >= 1, name, f"{name} is {limit}: give at least 1")
    _demand(len(chat.stop_strings) <= MAX_STOP_STRINGS, "stop", f"stop: give at most {MAX_STOP_STRINGS} strings")
    _demand("" not in chat.stop_strings, "stop", "stop: an empty string ends no answer")
    top = chat.top_logprobs
    _demand(top is None or 0 <= top <= MAX_TOP_LOGPROBS, "top_logprobs", f"give 0 to {MAX_TOP_LOGPROBS}")
    _demand(not top or bool(chat.logprobs), "top_logprobs", "top_logprobs needs logprobs true")
    effort = chat.reasoning_effort
    _demand(
        effort is None or effort in EFFORT_TOKENS,
        "reasoning_effort",
        f"reasoning_effort {effort!r} is unknown: give one of {', '.join(EFFORT_TOKENS)}",
    )
    _check_tools(chat)
    for number, message in enumerate(chat.messages):
        _check_message(message, number, chat.messages[:number])


def _check_tools(chat: ChatRequest) -> None:
    tools = chat.tools or []
    _demand(len(tools) <= MAX_TOOLS, "tools", f"{len(tools)} tools are declared: give at most {MAX_TOOLS}")
    names: set[str] = set()
    for at, tool in enumerate(tools):
        kind, function = tool.get("type", "function"), tool.get("function")
        _demand(kind == "function", f"tools[{at}].type", f"tools of type {kind!r} are not supported: give functions")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise invalid(f"tools[{at}] has no function with a name", f"tools[{at}].function.name")
        _demand(name not in names, f"tools[{at}].function.name", f"the function {name!r} is declared twice")
        names.add(name)
    choice = chat.tool_choice
    _demand(
        choice in (None, "auto", "none"),
        "tool_choice",
        "tool_choice can be auto or none: calls cannot be forced yet",
    )


def _check_message(message: Mapping[str, Any], number: int, before: list[dict[str, Any]]) -> None:
    content = message.get("content")
    for at, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind not in _TEXT_PARTS:
            where = f"messages[{number}].content[{at}]"
            raise invalid(f"{where} is {kind!r}, and this model reads text only", where, "unsupported_content")
    if message.get("role") != "tool":
        return
    _demand(
        bool(message.get("tool_call_id")),
        f"messages[{number}].tool_call_id",
        f"messages[{number}]: a tool's result needs the tool_call_id of its call",
    )
    _demand(
        any(earlier.get("tool_calls") for earlier in before),
        f"messages[{number}]",
        f"messages[{number}] is the result of a tool, and no message before it calls one",
    )


def _demand(holds: bool, param: str, message: str) -> None:
    if not holds:
        raise invalid(message, param)
