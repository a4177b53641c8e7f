"""Detection of markers in a reply: control tokens, and their names spelled in text. Knows no structure of a reply."""

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
# In each name, '<' is the first character and occurs only there.
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
class Found:
    """A marker in a reply."""

    marker: Marker
    name: str
    is_token: bool
    """True for a control token; False for ordinary text that spells its name, for instance a quote of the user."""


class MarkerScanner:
    """A scanner that splits the text of a reply at markers, independent of how the text is split on arrival.

    A name in ``control_names`` is a marker only as that control token. Any other name is a marker where text spells it.
    """

    def __init__(self, control_names: Collection[str]) -> None:
        spelled = [name for name in NAMES if name not in control_names]
        self._spelled = re.compile("|".join(map(re.escape, spelled)) or r"(?!)")
        self._beginnings = {name[:length] for name in spelled for length in range(1, len(name))}
        self._held = ""

    def text(self, text: str) -> Iterator[str | Found]:
        """Yield the parts of the next ordinary text. Hold back an end that may be the beginning of a marker."""
        text = self._held + text
        end = 0
        for match in self._spelled.finditer(text):
            yield from _unless_empty(text[end : match.start()])
            yield Found(NAMES[match.group()], match.group(), is_token=False)
            end = match.end()
        rest = text[end:]
        bracket = rest.rfind("<")
        cut = bracket if bracket >= 0 and rest[bracket:] in self._beginnings else len(rest)
        self._held = rest[cut:]
        yield from _unless_empty(rest[:cut])

    def control(self, name: str) -> Iterator[str | Found]:
        """Yield held-back text, then the next control token: a marker, or its name as text if it is not a marker."""
        yield from self.flush()
        yield Found(NAMES[name], name, is_token=True) if name in NAMES else name

    def flush(self) -> Iterator[str]:
        """Yield the held-back text, which is not a marker."""
        held, self._held = self._held, ""
        yield from _unless_empty(held)


def _unless_empty(text: str) -> Iterator[str]:
    if text:
        yield text
