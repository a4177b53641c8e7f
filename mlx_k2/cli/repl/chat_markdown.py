r"""Markdown of a chat: headings are at the left, list numbers have dots, formulas are shown unchanged.

A formula is the text between \( and \), \[ and \], or $$ and $$. Its backslashes, underscores and stars stay.
"""

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Heading, ListItem, Markdown
from rich.segment import Segment

_CLOSING_OF = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}
"""The end of a formula, by its beginning."""
_LATEX_ESCAPES = frozenset("()[]{},;:!\\ ")
"""Characters after a backslash that are more often LaTeX than Markdown. Backslash and character stay."""


def chat_parser() -> MarkdownIt:
    """Return a parser of formulas, and of the Markdown that rich can show."""
    parser = MarkdownIt().enable(["strikethrough", "table"])
    parser.inline.ruler.before("escape", "formula", _formula)
    return parser


def _formula(state: StateInline, silent: bool) -> bool:
    """Read a formula, or an escape of LaTeX, as text; return False if there is none. A rule of markdown-it."""
    opening = state.src[state.pos : state.pos + 2]
    closing_at = -1
    if opening in _CLOSING_OF:
        closing_at = state.src.find(_CLOSING_OF[opening], state.pos + 2, state.posMax)
    if closing_at >= 0:
        length = closing_at + 2 - state.pos
    elif len(opening) == 2 and opening[0] == "\\" and opening[1] in _LATEX_ESCAPES:
        length = 2
    else:
        return False
    if not silent:
        state.pending += state.src[state.pos : state.pos + length]
    state.pos += length
    return True


class _LeftHeading(Heading):
    """A heading at the left, whatever its level."""

    LEVEL_ALIGN = {}  # noqa: RUF012 - rich's own name; a level without an entry is at the left


class _NumberedItem(ListItem):
    """A list item whose number has a dot."""

    def render_number(self, console: Console, options: ConsoleOptions, number: int, last_number: int) -> RenderResult:
        """Yield the item's lines, the first after the number."""
        numeral = f"{number}.".rjust(len(str(last_number)) + 2) + " "
        lines = console.render_lines(
            self.elements, options.update(width=options.max_width - len(numeral)), style=self.style
        )
        style = console.get_style("markdown.item.number", default="none")
        for index, line in enumerate(lines):
            yield Segment(" " * len(numeral) if index else numeral, style)
            yield from line
            yield Segment.line()


class ChatMarkdown(Markdown):
    """Markdown of a chat, from the tokens of `chat_parser`."""

    elements = {**Markdown.elements, "heading_open": _LeftHeading, "list_item_open": _NumberedItem}  # noqa: RUF012

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__("")
        self.parsed = tokens
