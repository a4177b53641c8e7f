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


Part: TypeAlias = Reasoning | Content | ToolCall


@dataclass(frozen=True)
class Reply:
    """All parts of a reply."""

    reasoning: str
    content: str
    calls: tuple[ToolCall, ...]


def whole_reply(parts: Iterable[Part]) -> Reply:
    """Return the parts of one reply joined into a Reply."""
    parts = list(parts)
    return Reply(
        reasoning="".join(part.text for part in parts if isinstance(part, Reasoning)),
        content="".join(part.text for part in parts if isinstance(part, Content)),
        calls=tuple(part for part in parts if isinstance(part, ToolCall)),
    )
