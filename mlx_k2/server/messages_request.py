"""The body of a request of Anthropic's Messages API, and its conversion to a chat request. Knows no model.

Fields, block types and tool types that this module does not name are ignored: clients send new ones each month.
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
from mlx_k2.server.turn_store import TURN_HANDLE_FIELD

_BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n*")
"""The first line of Claude Code's system prompt. It differs in each request, so no prompt would match the cache."""
_UNREADABLE_TYPES = ("image", "document", "search_result")
"""Types of blocks that are not text. They are refused in a message, and replaced by a line in a tool's result."""
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """A content block of any type; each type has some of these fields."""

    type: str
    text: str = ""
    thinking: str = ""
    signature: str | None = None
    """The turn handle of an earlier answer."""
    id: str = ""
    name: str = ""
    input: dict[str, Any] | None = None
    tool_use_id: str = ""
    content: Any = None
    is_error: bool | None = None
    tool_name: str = ""
    """The tool that a ``tool_reference`` block names."""


class MessageEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A message. Adjacent messages of the same role are one turn of the conversation."""

    role: str
    content: str | list[Block]


class MessagesTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool. Its ``type`` is None or "custom" for the client's own; Anthropic defines tools of other types."""

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
    """Whether the model thinks, for how many tokens, and whether the client gets the text."""

    display: str | None = None
    """"omitted": thinking blocks have no text; with their signatures the server restores it in later prompts."""


class OutputFormat(msgspec.Struct, frozen=True, kw_only=True):
    """The format of the answer text."""

    type: str
    schema: dict[str, Any] | None = None


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How much the model thinks, and the format of the answer text."""

    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of ``POST /v1/messages/count_tokens`` that are read."""

    model: str | None = None
    messages: list[MessageEntry]
    system: str | list[Block] | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: MessagesThinking | None = None
    output_config: OutputConfig | None = None

    @property
    def chat(self) -> ChatRequest:
        """The request, converted to a chat request.

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
    """The most tokens of the answer; 0: compute the prompt for the cache, and send an empty answer."""
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None

    @property
    def chat(self) -> ChatRequest:
        """The request, converted to a chat request.

        Raises:
            ApiError: 400; names the field that cannot be served.
        """
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
    """Return the system message without Claude Code's billing line; [] if it has no text."""
    blocks = [block.text for block in _blocks(system or "") if block.type == "text"]
    if blocks and (billing := _BILLING.match(blocks[0])):
        blocks[0] = blocks[0][billing.end() :]
    text = "\n\n".join(filter(None, blocks))
    return [{"role": "system", "content": text}] if text else []


def _messages(entries: Sequence[MessageEntry]) -> Iterator[dict[str, Any]]:
    """Yield the messages of a chat request: of each turn the tool results, then its text if it has any."""
    check_field(bool(entries), "messages", "messages: there is no message to answer")
    for role, turn in groupby(enumerate(entries), lambda numbered: numbered[1].role):
        numbered_entries = list(turn)
        role_field = f"messages[{numbered_entries[0][0]}].role"
        is_known = role in ("user", "assistant", "system")
        check_field(is_known, role_field, f"{role_field} is {role!r}: give user or assistant")
        blocks = [
            (f"messages[{number}].content[{index}]", block)
            for number, entry in numbered_entries
            for index, block in enumerate(_blocks(entry.content))
        ]
        if role == "assistant":
            yield _assistant([block for _, block in blocks])
            continue
        yield from (_result(where, block) for where, block in blocks if block.type == "tool_result")
        texts = [_user_text(where, block) for where, block in blocks if block.type in ("text", *_UNREADABLE_TYPES)]
        if texts or not blocks:  # content [] is an empty text
            yield {"role": role, "content": "\n".join(texts)}
    check_field(
        entries[-1].role != "assistant",
        "messages",
        "the last message is the assistant's: this server does not continue an answer, so end with a user's",
    )


def _user_text(where: str, block: Block) -> str:
    if block.type != "text":
        message = f"{where} is {block.type!r}, and this model reads text only"
        raise bad_request_error(message, where, "unsupported_content")
    return block.text


def _assistant(blocks: Sequence[Block]) -> dict[str, Any]:
    text = "".join(block.text for block in blocks if block.type == "text")
    message: dict[str, Any] = {"role": "assistant", "content": text}
    thinking_blocks = [block for block in blocks if block.type == "thinking"]
    if thinking_blocks:
        message["reasoning_content"] = "".join(block.thinking for block in thinking_blocks)
        message[TURN_HANDLE_FIELD] = thinking_blocks[-1].signature
    calls = [block for block in blocks if block.type == "tool_use"]
    if calls:
        message["tool_calls"] = [
            {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input or {}}}
            for block in calls
        ]
    return message


def _result(where: str, block: Block) -> dict[str, Any]:
    """Return the message with a tool's result. "Error: " marks a failed call, for which chat messages have no field.

    An unreadable part is replaced by a line: a tool's image must not end the conversation.
    """
    content = block.content
    try:
        parts = _blocks(content if isinstance(content, str) else convert(content or [], list[Block]))
    except JsonError as error:
        raise bad_request_error(f"{where}.content: {error}", f"{where}.content") from None
    texts = [
        f"[{part.type} left out: this model reads text only]"
        if part.type in _UNREADABLE_TYPES
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
    """Return the client's own tools as functions; tools of other types are left out."""
    declarations = []
    for tool in tools:
        if tool.type not in (None, "custom"):
            continue
        fields = {"description": tool.description, "parameters": tool.input_schema, "strict": tool.strict}
        function = {"name": tool.name} | {name: value for name, value in fields.items() if value is not None}
        declarations.append({"type": "function", "function": function})
    return declarations


def _tool_choice(choice: MessagesToolChoice) -> str | dict[str, Any]:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    if choice.type not in _TOOL_CHOICES:
        raise bad_request_error(
            f"tool_choice.type is {choice.type!r}: give auto, any, tool or none", "tool_choice.type"
        )
    return _TOOL_CHOICES[choice.type]


def _response_format(output_format: OutputFormat) -> dict[str, Any]:
    if output_format.type != "json_schema" or output_format.schema is None:
        message = "output_config.format: give the type json_schema, and a schema"
        raise bad_request_error(message, "output_config.format")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": output_format.schema}}
