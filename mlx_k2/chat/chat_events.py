"""What happens in a conversation, as a session tells it. Knows neither who listens nor how it is shown."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.text_stream import Delta
from mlx_k2.text.reply_parser import Part
from mlx_k2.text.tool_call import ToolCall
from mlx_k2.tools.outcome import ToolResult


@dataclass(frozen=True)
class MessageAdded:
    """A message is complete and part of the conversation: of the user, the model or a tool."""

    message: Mapping[str, Any]


@dataclass(frozen=True)
class CallStarted:
    """A tool runs now."""

    call: ToolCall


@dataclass(frozen=True)
class CallEnded:
    """A call has its result, whether it ran or not; ``seconds`` is None where it did not."""

    call: ToolCall
    result: ToolResult
    seconds: float | None


Event: TypeAlias = Delta | Part | AnswerSummary | MessageAdded | CallStarted | CallEnded
"""A token, the parts of a reply that it completes, what the reply took; messages; calls."""
