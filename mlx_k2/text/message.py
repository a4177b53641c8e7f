"""Messages of a conversation, made also from replies and tool results. Knows no template and reads no JSON."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from mlx_k2.text.reply_parts import Reply
from mlx_k2.text.tool_call import UNKNOWN, call_id

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]


class CalledFunction(msgspec.Struct, frozen=True):
    """The function of a call. ``arguments`` is the text that the model wrote, or a JSON value from a history."""

    name: str
    arguments: Any


class MessageCall(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call in a message of the model."""

    id: str
    type: str = "function"
    function: CalledFunction


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message with the fields of OpenAI's format. ``other`` has further fields, which the chat template reads."""

    role: Role
    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[MessageCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    other: dict[str, object] = {}

    def json_value(self) -> dict[str, object]:
        """Return the message as a JSON object in OpenAI's format, for templates and files."""
        fields: dict[str, object] = msgspec.to_builtins(self)
        fields.pop("other", None)
        if self.tool_calls:
            fields["tool_calls"] = [msgspec.to_builtins(call) for call in self.tool_calls]  # to_builtins keeps a tuple
        return fields | self.other


def assistant_message(reply: Reply, num_calls_before: int) -> Message:
    """Return ``reply`` as a message; each call's arguments are the text that the model wrote.

    The calls get the ids that Kimi K2 is trained on, even if the model wrote others: functions.NAME:NUMBER, where
    NUMBER counts the calls of the conversation from 0, and the first call of ``reply`` has ``num_calls_before``.
    """
    calls = tuple(
        MessageCall(id=call_id(call.name, number), function=CalledFunction(call.name or UNKNOWN, call.arguments))
        for number, call in enumerate(reply.calls, start=num_calls_before)
    )
    return Message(role="assistant", content=reply.content, reasoning_content=reply.reasoning, tool_calls=calls)


def tool_messages(assistant: Message, results: Sequence[str]) -> list[Message]:
    """Return one message for each call in ``assistant``; ``results`` has the calls' results in the same order."""
    return [
        Message(role="tool", tool_call_id=call.id, name=call.function.name, content=result)
        for call, result in zip(assistant.tool_calls, results, strict=True)
    ]


def num_calls(messages: Sequence[Message]) -> int:
    """Return the number of tool calls in a conversation. This is also the number in the id of its next call."""
    return sum(len(message.tool_calls) for message in messages)
