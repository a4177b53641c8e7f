"""Detection of markers in a reply: control tokens, and their names spelled as text. Knows no structure of a reply."""

import enum
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass


class Marker(enum.Enum):
    """The markers that structure a reply."""

    THINK_BEGIN = enum.auto()
    THINK_END = enum.auto()
    SECTION_BEGIN = enum.auto()
    SECTION_END = enum.auto()
    CALL_BEGIN = enum.auto()
    ARGUMENTS_BEGIN = enum.auto()
    CALL_END = enum.auto()


# The section markers in the singular are not control tokens of any Kimi vocabulary, but models write them.
# In each name, '<' is the first character and occurs only there: MarkerScanner.text searches for it.
NAMES = {
    "<think>": Marker.THINK_BEGIN,
    "</think>": Marker.THINK_END,
    "<|tool_calls_section_begin|>": Marker.SECTION_BEGIN,
    "<|tool_call_section_begin|>": Marker.SECTION_BEGIN,
    "<|tool_calls_section_end|>": Marker.SECTION_END,
    "<|tool_call_section_end|>": Marker.SECTION_END,
    "<|tool_call_begin|>": Marker.CALL_BEGIN,
    "<|tool_call_argument_begin|>": Marker.ARGUMENTS_BEGIN,
    "<|tool_call_end|>": Marker.CALL_END,
}


@dataclass(frozen=True)
class MarkerMatch:
    """A marker that a reply contains."""

    marker: Marker
    name: str
    is_token: bool
    """True for a control token; False for ordinary text that spells its name, such as a quotation."""


class MarkerScanner:
    """A scanner that splits the text of a reply at markers.

    The markers, and the joined text between them, do not depend on how the text is divided among calls of ``text``.
    A name in ``control_names`` is a marker only as a control token. Any other name is a marker where text spells it.
    """

    def __init__(self, control_names: Collection[str]) -> None:
        names = [name for name in NAMES if name not in control_names]
        self._spelled_marker = re.compile("|".join(map(re.escape, names)) or r"(?!)")  # without names: no match
        self._prefixes = {name[:length] for name in names for length in range(1, len(name))}
        self._pending = ""
        """Text that may be the beginning of a marker."""

    def text(self, text: str) -> Iterator[str | MarkerMatch]:
        """Yield the next ordinary text, split at markers. Text that may begin a marker is held back."""
        text = self._pending + text
        end = 0
        for match in self._spelled_marker.finditer(text):
            yield from _unless_empty(text[end : match.start()])
            yield MarkerMatch(NAMES[match.group()], match.group(), is_token=False)
            end = match.end()
        rest, bracket, name_start = text[end:].rpartition("<")
        if bracket + name_start in self._prefixes:
            self._pending = bracket + name_start
        else:
            rest, self._pending = text[end:], ""
        yield from _unless_empty(rest)

    def control(self, name: str) -> Iterator[str | MarkerMatch]:
        """Yield the held-back text, then the next control token: as a MarkerMatch if it is a marker, else its name."""
        yield from self.flush()
        yield MarkerMatch(NAMES[name], name, is_token=True) if name in NAMES else name

    def flush(self) -> Iterator[str]:
        """Yield the held-back text, which is no marker since no text follows."""
        text, self._pending = self._pending, ""
        yield from _unless_empty(text)


def _unless_empty(text: str) -> Iterator[str]:
    if text:
        yield text
