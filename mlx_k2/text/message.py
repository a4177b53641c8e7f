"""Messages of a conversation in the one form that the program uses. Knows no template and reads no JSON."""

from typing import Any, Literal, TypeAlias

import msgspec

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]


class CalledFunction(msgspec.Struct, frozen=True):
    """The function of a call. ``arguments`` is the text that the model wrote, or a JSON value from another program."""

    name: str
    arguments: Any


class MessageCall(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call in a message of the model."""

    id: str
    type: str = "function"
    function: CalledFunction


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message in OpenAI's format. ``other`` holds fields that only the chat template knows."""

    role: Role
    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[MessageCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    other: dict[str, object] = {}

    def json_value(self) -> dict[str, object]:
        """Return the message as JSON holds it, for templates and files."""
        fields: dict[str, object] = msgspec.to_builtins(self)
        fields.pop("other", None)
        if self.tool_calls:
            fields["tool_calls"] = [msgspec.to_builtins(call) for call in self.tool_calls]
        return fields | self.other
