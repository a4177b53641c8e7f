"""The parts of a reply: reasoning, content and tool calls. Knows no tokens."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from mlx_k2.text.tool_call import ToolCall


@dataclass(frozen=True)
class Reasoning:
    """A further part of the reasoning text."""

    text: str


@dataclass(frozen=True)
class Content:
    """A further part of the answer text."""

    text: str


@dataclass(frozen=True)
class ToolCallHeader:
    """The header of a tool call. ArgumentsText parts follow, and then the complete ToolCall."""

    name: str
    """The tool's name; '' if the header names none."""


@dataclass(frozen=True)
class ArgumentsText:
    """A further part of the arguments of the current tool call, as the model writes them."""

    text: str


Part: TypeAlias = Reasoning | Content | ToolCallHeader | ArgumentsText | ToolCall


@dataclass(frozen=True)
class Reply:
    """A complete reply."""

    reasoning: str
    content: str
    calls: tuple[ToolCall, ...]


def whole_reply(parts: Iterable[Part]) -> Reply:
    """Return the reply with these parts."""
    parts = list(parts)
    return Reply(
        reasoning="".join(part.text for part in parts if isinstance(part, Reasoning)),
        content="".join(part.text for part in parts if isinstance(part, Content)),
        calls=tuple(part for part in parts if isinstance(part, ToolCall)),
    )
