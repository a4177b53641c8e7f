"""The events that a chat session yields. Knows neither their receivers nor their display."""

from dataclasses import dataclass
from typing import TypeAlias

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.handle import Progress, Token
from mlx_k2.text.message import Message
from mlx_k2.text.reply_parts import Part
from mlx_k2.text.tool_call import ToolCall
from mlx_k2.tools.outcome import ToolResult


@dataclass(frozen=True)
class MessageAdded:
    """A complete message of the user, the model or a tool, now part of the conversation."""

    message: Message


@dataclass(frozen=True)
class CallStarted:
    """The start of a tool call."""

    call: ToolCall


@dataclass(frozen=True)
class CallEnded:
    """The result of a tool call. ``seconds``: time since the reply's calls were started; None if it did not run."""

    call: ToolCall
    result: ToolResult
    seconds: float | None


Event: TypeAlias = Progress | Token | Part | AnswerSummary | MessageAdded | CallStarted | CallEnded
"""Progress while no token arrives; a token; a part of a reply, after the token that completes it; the summary of a
reply; a message; the start or end of a tool call."""
