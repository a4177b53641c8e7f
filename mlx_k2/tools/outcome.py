"""How a tool call ended, and what the model reads of it. Knows neither servers nor protocols."""

import enum
from dataclasses import dataclass


class Outcome(enum.Enum):
    """How a tool call ended."""

    DONE = "done"
    CUT = "cut"
    """Done, but it returned more than the bound; the text is its beginning."""
    FAILED = "failed"
    """The tool says that it failed, or its server does not take the call."""
    TIMED_OUT = "timed out"
    LOST = "lost"
    """The server ended or cannot be reached; its next call starts it anew."""
    REFUSED = "refused"
    """No such tool, a malformed call, or one too many."""
    DECLINED = "declined"
    """The user does not want it."""
    STOPPED = "stopped"
    """The user stopped it while it ran."""


@dataclass(frozen=True)
class ToolResult:
    """The answer to one call; ``text`` is what the model reads, whatever the outcome."""

    outcome: Outcome
    text: str
