"""The body of a request of Anthropic's Messages API, and the same as a chat request. Knows no model.

Fields and blocks that are not named here are ignored, as are tools of other types than a client's own: clients send new
ones each month.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import msgspec

from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import convert
from mlx_k2.server.api_errors import bad_request_error
from mlx_k2.server.chat_request import ChatRequest, Thinking, check_chat
from mlx_k2.server.request_fields import check_field
from mlx_k2.server.turn_store import HANDLE_FIELD

_BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n*")
"""Claude Code begins the system prompt with this line. It differs each time, and no prompt would match the cache."""
_UNREADABLE = ("image", "document", "search_result")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """A content block of any type, with all fields that are read."""

    type: str
    text: str = ""
    thinking: str = ""
    signature: str | None = None
    """The handle of a stored turn."""
    id: str = ""
    name: str = ""
    input: dict[str, Any] | None = None
    tool_use_id: str = ""
    content: Any = None
    is_error: bool | None = None
    tool_name: str = ""


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """A message. Several of one role in a row are one turn."""

    role: str
    content: str | list[Block]


class MessagesTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool. One with another type than "custom" is run by Anthropic's servers or known to its models only."""

    name: str = ""
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    """Whether the arguments of a call are streamed as they are sampled."""


class MessagesToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Which tool the model calls: auto, any, tool (with a name) or none."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class MessagesThinking(Thinking, frozen=True, kw_only=True):
    """Whether the model thinks, for how many tokens, and whether the client sees it."""

    display: str | None = None
    """"omitted" leaves the text out of the answer; its signature still brings it back."""


class OutputFormat(msgspec.Struct, frozen=True, kw_only=True):
    """The form of the answer text."""

    type: str
    schema: dict[str, Any] | None = None


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How much the model thinks, and the form of the answer text."""

    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of ``POST /v1/messages/count_tokens`` that are read."""

    model: str | None = None
    messages: list[Turn]
    system: str | list[Block] | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: MessagesThinking | None = None
    output_config: OutputConfig | None = None

    @property
    def chat(self) -> ChatRequest:
        """The same as a chat request.

        Raises:
            ApiError: 400; names the field that cannot be served.
        """
        config, choice = self.output_config or OutputConfig(), self.tool_choice
        is_serial = choice is not None and choice.disable_parallel_tool_use
        chat = ChatRequest(
            model=self.model,
            messages=[*_system(self.system), *_messages(self.messages)],
            tools=_tools(self.tools or ()),
            tool_choice=None if choice is None else _tool_choice(choice),
            parallel_tool_calls=False if is_serial else None,
            thinking=self.thinking,
            reasoning_effort=config.effort,
            response_format=None if config.format is None else _response_format(config.format),
        )
        check_chat(chat)
        return chat


class MessagesRequest(CountRequest, frozen=True, kw_only=True):
    """The fields of ``POST /v1/messages`` that are read."""

    max_tokens: int
    """The most tokens of the answer. 0 computes the prompt for the cache, and answers nothing."""
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None

    @property
    def chat(self) -> ChatRequest:
        """The same as a chat request. Errors are those of CountRequest."""
        check_field(self.max_tokens >= 0, "max_tokens", f"max_tokens is {self.max_tokens}: give at least 0")
        chat = msgspec.structs.replace(
            super().chat,
            max_tokens=max(1, self.max_tokens),
            stream=self.stream,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
        )
        check_chat(chat)
        return chat


def _system(system: str | list[Block] | None) -> list[dict[str, Any]]:
    """Return the system message, without Claude Code's billing line at its start."""
    blocks = [block.text for block in _blocks(system or "") if block.type == "text"]
    if blocks and (billing := _BILLING.match(blocks[0])):
        blocks[0] = blocks[0][billing.end() :]
    text = "\n\n".join(filter(None, blocks))
    return [{"role": "system", "content": text}] if text else []


def _messages(turns: Sequence[Turn]) -> Iterator[dict[str, Any]]:
    check_field(bool(turns), "messages", "messages: there is no message to answer")
    for role, numbered in groupby(enumerate(turns), lambda entry: entry[1].role):
        of_role = list(numbered)
        check_field(
            role in ("user", "assistant", "system"),
            f"messages[{of_role[0][0]}].role",
            f"messages[{of_role[0][0]}].role is {role!r}: give user or assistant",
        )
        blocks = [
            (f"messages[{number}].content[{at}]", block)
            for number, turn in of_role
            for at, block in enumerate(_blocks(turn.content))
        ]
        if role == "assistant":
            yield _assistant([block for _, block in blocks])
            continue
        yield from (_result(where, block) for where, block in blocks if block.type == "tool_result")
        texts = [_user_text(where, block) for where, block in blocks if block.type in ("text", *_UNREADABLE)]
        if texts or not blocks:
            yield {"role": role, "content": "\n".join(texts)}
    check_field(
        turns[-1].role != "assistant",
        "messages",
        "messages end with the assistant's: this server does not continue an answer, so end with the user's",
    )


def _user_text(where: str, block: Block) -> str:
    if block.type != "text":
        raise bad_request_error(
            f"{where} is {block.type!r}, and this model reads text only", where, "unsupported_content"
        )
    return block.text


def _assistant(blocks: Sequence[Block]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    message["content"] = "".join(block.text for block in blocks if block.type == "text")
    thoughts = [block for block in blocks if block.type == "thinking"]
    if thoughts:
        message["reasoning_content"] = "".join(block.thinking for block in thoughts)
        message[HANDLE_FIELD] = thoughts[-1].signature
    calls = [block for block in blocks if block.type == "tool_use"]
    if calls:
        message["tool_calls"] = [
            {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input or {}}}
            for block in calls
        ]
    return message


def _result(where: str, block: Block) -> dict[str, Any]:
    """Return a tool's result. The model has no field for an error, so the text says it.

    What is no text is replaced by a note: a tool's image must not end the conversation.
    """
    try:
        parts = _blocks(content if isinstance(content := block.content, str) else convert(content or [], list[Block]))
    except JsonError as error:
        raise bad_request_error(f"{where}.content: {error}", f"{where}.content") from None
    texts = [
        f"[{part.type} left out: this model reads text only]"
        if part.type in _UNREADABLE
        else part.text or part.tool_name
        for part in parts
    ]
    text = "\n".join(filter(None, texts))
    return {
        "role": "tool",
        "tool_call_id": block.tool_use_id,
        "content": f"Error: {text}" if block.is_error else text,
    }


def _blocks(content: str | list[Block]) -> list[Block]:
    return [Block(type="text", text=content)] if isinstance(content, str) else content


def _tools(tools: Sequence[MessagesTool]) -> list[dict[str, Any]]:
    """Return the client's own tools as functions."""
    declared = []
    for tool in tools:
        if tool.type not in (None, "custom"):
            continue
        fields = {"description": tool.description, "parameters": tool.input_schema, "strict": tool.strict}
        given = {name: value for name, value in fields.items() if value is not None}
        declared.append({"type": "function", "function": {"name": tool.name, **given}})
    return declared


def _tool_choice(choice: MessagesToolChoice) -> str | dict[str, Any]:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    if choice.type not in _CHOICES:
        raise bad_request_error(
            f"tool_choice.type is {choice.type!r}: give auto, any, tool or none", "tool_choice.type"
        )
    return _CHOICES[choice.type]


def _response_format(wanted: OutputFormat) -> dict[str, Any]:
    if wanted.type != "json_schema" or wanted.schema is None:
        message = "output_config.format: give the type json_schema, and a schema"
        raise bad_request_error(message, "output_config.format")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted.schema}}
