"""What both screens say in the same words. Knows no terminal."""

import unicodedata

from mlx_k2.chat.chat_events import CallEnded
from mlx_k2.scheduling.request import FinishReason
from mlx_k2.text.tool_call import ToolCall
from mlx_k2.tools.outcome import Outcome

CUT = {
    FinishReason.LENGTH: "cut off at the limit of tokens",
    FinishReason.TIMEOUT: "cut off by --timeout",
}
"""How an answer ended that the model would have gone on with."""
_MAX_ARGUMENTS = 200
_MAX_RESULT = 200


def printable(text: str) -> str:
    """``text`` without what a terminal would obey: control characters but for line ends and tabs."""
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter) != "Cc" else "\N{REPLACEMENT CHARACTER}"
        for letter in text
    )


def one_line(text: str, max_chars: int) -> str:
    """``text`` on one line, cut with dots."""
    line = " ".join(printable(text).split())
    return line if len(line) <= max_chars else line[: max_chars - 1] + "…"


def call_line(call: ToolCall) -> str:
    """A call as people write one."""
    return f"{printable(call.name) or 'unnamed'}({one_line(call.arguments, _MAX_ARGUMENTS)})"


def ended_line(ended: CallEnded) -> str:
    """A call with its result, and how it ended where that is not as hoped."""
    result = ended.result
    how = "" if result.outcome is Outcome.DONE else f"[{result.outcome.value}] "
    seconds = "" if ended.seconds is None else f" ({ended.seconds:.1f} s)"
    return f"{call_line(ended.call)} → {how}{one_line(result.text, _MAX_RESULT)}{seconds}"
