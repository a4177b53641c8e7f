"""Lines of text on tool calls and progress. Knows no terminal."""

from mlx_k2.chat.chat_events import CallEnded
from mlx_k2.cli.terminal_text import escaped_json, printable, visible
from mlx_k2.coordinator.handle import PrefillProgress, Progress, Queued, Restarting
from mlx_k2.scheduling.request import FinishReason
from mlx_k2.text.tool_call import ToolCall
from mlx_k2.tools.outcome import Outcome

CUT_TEXTS = {
    FinishReason.LENGTH: "cut off at the limit of tokens",
    FinishReason.TIMEOUT: "cut off by --timeout",
}
"""The texts for finish reasons of answers that a limit ended."""
_MAX_ARGUMENTS_CHARS = 200
_MAX_RESULT_CHARS = 200


def one_line(text: str, max_chars: int) -> str:
    """Return ``text`` on one line of at most ``max_chars`` characters; a longer text ends with an ellipsis."""
    line = " ".join(printable(text).split())
    return line if len(line) <= max_chars else line[: max_chars - 1] + "…"


def call_line(call: ToolCall) -> str:
    """Return a call in the form NAME(ARGUMENTS), with invisible characters escaped and long arguments cut."""
    return f"{visible(call.name) or 'unnamed'}({visible(one_line(call.arguments, _MAX_ARGUMENTS_CHARS))})"


def full_call(call: ToolCall) -> str:
    """Return a call for the user's approval: its name, then each argument in full on separate lines.

    The arguments are the parsed ones, which the tool gets. Invisible characters are escaped.
    """
    arguments = [f"  {visible(name)}:{_argument(value)}" for name, value in (call.values or {}).items()]
    return "\n".join((visible(call.name), *arguments))


def _argument(value: object) -> str:
    """Return a value as JSON after a space; a text of several lines on new lines, each of which begins with a bar."""
    if isinstance(value, str) and "\n" in value:
        return "".join(f"\n    | {visible(line)}" for line in value.split("\n"))
    return f" {escaped_json(value)}"


def ended_call_line(event: CallEnded) -> str:
    """Return a line with a call, its outcome (except DONE), its result and its seconds."""
    result = event.result
    outcome = "" if result.outcome is Outcome.DONE else f"[{result.outcome.value}] "
    seconds = "" if event.seconds is None else f" ({event.seconds:.1f} s)"
    return f"{call_line(event.call)} → {outcome}{one_line(result.text, _MAX_RESULT_CHARS)}{seconds}"


def progress_line(progress: Progress) -> str:
    """Return a line for a request that waits, whose prompt is computed, or whose stages restart."""
    match progress:
        case Queued(0):
            return "waiting for a free slot"
        case Queued(position):
            return f"waiting: {position} requests come first"
        case PrefillProgress(done, total):
            return f"reading the prompt: {done:,} of {total:,} tokens"
        case Restarting(restart, phase):
            return f"restart {restart.count}: {phase}"
