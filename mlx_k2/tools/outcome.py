"""Results of tool calls: their outcome, and their text for the model. Knows neither servers nor protocols."""

import enum
from dataclasses import dataclass


class Outcome(enum.Enum):
    """The outcome of a tool call."""

    DONE = "done"
    CUT = "cut"
    """The tool returned a result longer than the limit; the text is its beginning."""
    FAILED = "failed"
    """The tool returned an error, its server rejected the call, or the answer could not be read."""
    TIMED_OUT = "timed out"
    LOST = "lost"
    """The server ended, or cannot be started or reached. The next call tries again."""
    REFUSED = "refused"
    """The tool does not exist, the call is malformed, or the limit of tool calls is reached."""
    DECLINED = "declined"
    """The user did not approve the call."""
    STOPPED = "stopped"
    """The user stopped the answer while the call ran or before it ran."""


@dataclass(frozen=True)
class ToolResult:
    """The result of one call. The model gets ``text``, for every outcome."""

    outcome: Outcome
    text: str
