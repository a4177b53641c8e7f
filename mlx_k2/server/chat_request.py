"""The bodies of chat and text completions, /tokenize and /detokenize, and the check of their values. Knows no model."""

from collections.abc import Mapping
from typing import Any

import msgspec

from mlx_k2.server.api_errors import bad_request_error
from mlx_k2.server.request_fields import GenerationFields, check_field, check_fields, read_fields
from mlx_k2.text.constraint import AnswerForm, AnswerFormat

MAX_TOOLS = 512
MAX_TOP_LOGPROBS = 20
EFFORT_TOKENS = {"none": 0, "minimal": 512, "low": 2048, "medium": 8192, "high": 32768, "xhigh": None, "max": None}
"""The thinking budget of each ``reasoning_effort``; None sets no limit."""
_TEXT_PARTS = ("text", "input_text", "output_text")


class Thinking(msgspec.Struct, frozen=True):
    """Moonshot's and Anthropic's field ``thinking``. ``keep`` "all" keeps earlier reasoning in the prompt."""

    type: str | None = None
    keep: Any = None
    budget_tokens: int | None = None


class TemplateOptions(msgspec.Struct, frozen=True):
    """The only variables that a client may set for the chat template."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    preserve_thinking: bool | None = None


class ChatRequest(GenerationFields, frozen=True, kw_only=True):
    """The fields of ``POST /v1/chat/completions`` that are read. Unknown fields are ignored."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None
    modalities: list[str] | None = None
    functions: Any = None
    function_call: Any = None

    @property
    def limit_tokens(self) -> int | None:
        """The most tokens of the answer, reasoning included; None: as many as fit into the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """The number of most likely tokens to report per position; None: report no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def answer_format(self) -> AnswerFormat | None:
        """The format of the answer text; None allows any text.

        Raises:
            ApiError: 400, the format is unknown, or has no schema.
        """
        given = self.response_format or {}
        kind = given.get("type", "text")
        if kind == "text":
            return None
        if kind == "json_object":
            return AnswerFormat(AnswerForm.JSON_SCHEMA, schema={"type": "object"})
        fields = given.get("json_schema")
        if kind != "json_schema" or not isinstance(fields, dict) or "schema" not in fields:
            hint = "give text, json_object, or json_schema with json_schema.schema"
            raise bad_request_error(f"response_format {kind!r} cannot be used: {hint}", "response_format")
        strict = fields.get("strict")
        is_boolean = strict is None or isinstance(strict, bool)
        check_field(is_boolean, "response_format", "response_format: give true or false for strict")
        return AnswerFormat(AnswerForm.JSON_SCHEMA, schema=fields["schema"], is_strict=bool(strict))

    @property
    def wants_thinking(self) -> bool | None:
        """Whether the model thinks before it answers; None is the model's default."""
        if (options := self.chat_template_kwargs) is not None:
            thinking = options.enable_thinking if options.thinking is None else options.thinking
            if thinking is not None:
                return thinking
        if self.thinking is not None and self.thinking.type is not None:
            return self.thinking.type != "disabled"
        return None if self.reasoning_effort is None else self.reasoning_effort != "none"

    @property
    def preserves_thinking(self) -> bool:
        """Whether the reasoning of earlier answers stays in the prompt."""
        if self.chat_template_kwargs is not None and self.chat_template_kwargs.preserve_thinking:
            return True
        return self.thinking is not None and self.thinking.keep == "all"

    @property
    def thinking_budget(self) -> int | None:
        """The most tokens of reasoning; None: no limit."""
        if self.thinking is not None and self.thinking.budget_tokens is not None:
            return max(0, self.thinking.budget_tokens)
        effort = self.reasoning_effort
        if effort is None or effort == "none":  # "none" turns thinking off instead, see wants_thinking
            return None
        return EFFORT_TOKENS[effort]


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """The fields of ``POST /v1/completions`` that are read. ``prompt`` is one text, or the token ids of one."""

    prompt: str | list[Any]
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None
    return_token_ids: bool | None = None
    """Whether to send the token ids of each choice, the stop token included."""

    @property
    def text_or_ids(self) -> str | list[int]:
        """The prompt as one text, or as token ids.

        Raises:
            ApiError: 400, it is neither one text nor the token ids of one.
        """
        prompt = self.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if isinstance(prompt, str) or all(type(number) is int for number in prompt):
            return prompt
        raise bad_request_error("prompt: give one text, or the token ids of one", "prompt")


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of ``POST /tokenize``: a text as ``prompt`` or ``content``, or the fields of a chat request."""

    prompt: str | None = None
    content: str | None = None
    messages: Any = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of ``POST /detokenize``."""

    tokens: list[int]


def read_chat_request(body: bytes) -> ChatRequest:
    """Return a checked chat request.

    Raises:
        ApiError: 400; names the field that is malformed, or asks for something that this server does not do.
    """
    chat = read_fields(body, ChatRequest)
    check_chat(chat)
    return chat


def read_completion_request(body: bytes) -> CompletionRequest:
    """Return a checked request for a text completion.

    Raises:
        ApiError: 400; names the field that is malformed, or asks for something that this server does not do.
    """
    completion = read_fields(body, CompletionRequest)
    check_fields(completion)
    for name in ("suffix", "echo", "logprobs", "response_format"):
        check_field(not getattr(completion, name), name, f"{name} is not supported: leave it out")
    best_of = completion.best_of
    check_field(best_of in (None, completion.n or 1), "best_of", "this server returns every choice: leave best_of out")
    return completion


def check_chat(chat: ChatRequest) -> None:
    """Refuse values that the server or the model cannot use.

    Raises:
        ApiError: 400; names the field.
    """
    check_fields(chat)
    for name in ("functions", "function_call"):
        check_field(getattr(chat, name) is None, name, f"{name} is deprecated: use tools and tool_choice")
    check_field(set(chat.modalities or ()) <= {"text"}, "modalities", "this model writes text only")
    top = chat.top_logprobs
    check_field(
        top is None or 0 <= top <= MAX_TOP_LOGPROBS, "top_logprobs", f"top_logprobs: give 0 to {MAX_TOP_LOGPROBS}"
    )
    check_field(not top or bool(chat.logprobs), "top_logprobs", "top_logprobs needs logprobs true")
    effort = chat.reasoning_effort
    check_field(
        effort is None or effort in EFFORT_TOKENS,
        "reasoning_effort",
        f"reasoning_effort {effort!r} is unknown: give one of {', '.join(EFFORT_TOKENS)}",
    )
    _check_tools(chat)
    has_call = False
    for number, message in enumerate(chat.messages):
        _check_message(message, number, has_call=has_call)
        has_call = has_call or bool(message.get("tool_calls"))


def _check_tools(chat: ChatRequest) -> None:
    tools = chat.tools or []
    check_field(len(tools) <= MAX_TOOLS, "tools", f"{len(tools)} tools are declared: give at most {MAX_TOOLS}")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        kind, function = tool.get("type", "function"), tool.get("function")
        check_field(
            kind == "function", f"tools[{index}].type", f"tools of type {kind!r} are not supported: give functions"
        )
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise bad_request_error(f"tools[{index}] has no function with a name", f"tools[{index}].function.name")
        check_field(name not in names, f"tools[{index}].function.name", f"the function {name!r} is declared twice")
        names.add(name)


def _check_message(message: Mapping[str, Any], number: int, *, has_call: bool) -> None:
    """Refuse a message that is not text, and a tool's result unless ``has_call``: an earlier message calls a tool."""
    content = message.get("content")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind not in _TEXT_PARTS:
            where = f"messages[{number}].content[{index}]"
            raise bad_request_error(
                f"{where} is {kind!r}, and this model reads text only", where, "unsupported_content"
            )
    if message.get("role") != "tool":
        return
    check_field(
        bool(message.get("tool_call_id")),
        f"messages[{number}].tool_call_id",
        f"messages[{number}]: a tool's result needs the tool_call_id of its call",
    )
    check_field(
        has_call,
        f"messages[{number}]",
        f"messages[{number}] is the result of a tool, and no message before it calls one",
    )
