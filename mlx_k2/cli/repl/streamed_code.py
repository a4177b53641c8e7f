"""A growing code fence. A line that is popped has been highlighted for the last time. Knows no other block."""

from collections.abc import Iterator, Sequence
from typing import Any

from markdown_it import MarkdownIt
from pygments.lexer import Lexer
from pygments.token import Comment, String
from rich.markdown import CodeBlock, Markdown
from rich.syntax import Syntax

_THEME = "monokai"  # as in rich's Markdown
_TAB_SIZE = 4


class StreamedCode:
    """One fence at top level, printed in parts. All parts together print what rich's CodeBlock prints.

    The colours can differ where a line's colour depends on later lines.
    """

    def __init__(self, first_line: str) -> None:
        self._parser = MarkdownIt().disable(["inline", "text_join"])
        self._first_line = first_line
        (fence,) = self._parser.parse(first_line)
        block = CodeBlock.create(Markdown(""), fence)
        assert isinstance(block, CodeBlock)
        self._highlighter = _Highlighter(block.lexer_name)
        self._code: list[str] = []  # the complete lines that are not popped
        self._last_line = ""  # incomplete
        self._is_first = True
        self.rest: str | None = None
        """The text after the fence; None while it is open."""

    def add(self, text: str) -> None:
        """Append ``text``."""
        *lines, self._last_line = (self._last_line + text).split("\n")
        code, end = self._parse_lines(lines)
        self._code += code
        if end is not None:
            self.rest = "\n".join([*lines[end:], self._last_line])
            self._last_line = ""

    def pop_complete(self) -> Syntax | None:
        """Remove and return the complete lines before the last one that is not blank; None if there are none.

        That line is kept, because ``pop_rest`` prints at least one, and the blank lines after it, because CodeBlock
        drops blank lines at the end.
        """
        last = max((number for number, line in enumerate(self._code) if line.strip()), default=0)
        if last == 0:
            return None
        lines, self._code = self._code[:last], self._code[last:]
        syntax = self._syntax(lines, is_end=False)
        self._is_first = False
        return syntax

    def pop_rest(self) -> Syntax:
        """Remove and return all lines, with the blank row below the block."""
        code = "\n".join([*self._code, *self._incomplete_line()]).rstrip()
        self._code, self._last_line = [], ""
        return self._syntax(code.split("\n"), is_end=True)

    def last_lines(self, max_lines: int) -> Syntax:
        """Return the last ``max_lines`` of the lines that are not popped, and the blank row below, for display."""
        lines = [*self._code, *self._incomplete_line()]
        return self._syntax(lines[-max_lines:], is_end=True, for_display=True)

    def _incomplete_line(self) -> list[str]:
        """Return a list with the incomplete line; an empty list if there is none, or if it closes the fence."""
        return self._parse_lines([self._last_line])[0] if self._last_line else []

    def _parse_lines(self, lines: Sequence[str]) -> tuple[list[str], int | None]:
        """Return the code in ``lines``, and the number of lines up to and with the closing one; None without one."""
        fence = self._parser.parse("\n".join([self._first_line, *lines, ""]))[0]
        assert fence.map is not None
        code = fence.content.split("\n")[:-1]
        num_lines = fence.map[1] - 1
        return code, num_lines if num_lines > len(code) else None  # a closed fence has one line more than its code

    def _syntax(self, lines: Sequence[str], *, is_end: bool, for_display: bool = False) -> Syntax:
        code = "\n".join(lines).expandtabs(_TAB_SIZE)
        lexer = self._highlighter.lex(code, advance=not for_display)
        padding = (1 if self._is_first else 0, 1, 1 if is_end else 0, 1)
        return Syntax(code, lexer, theme=_THEME, word_wrap=True, padding=padding, tab_size=_TAB_SIZE)


class _Highlighter:
    """The highlighting of one text in parts, each of whole lines."""

    def __init__(self, lexer_name: str) -> None:
        syntax = Syntax("", lexer_name, tab_size=_TAB_SIZE)
        self._lexer: Any = syntax.lexer or syntax.default_lexer
        self._last_opening_line = ""  # the line with the start of a string or comment that is still open
        # in a language with C's comments the probe is one comment
        kinds = [kind for kind, text in self._lexer.get_tokens("/**/") if text.strip()]
        self._has_c_comments = all(kind in Comment for kind in kinds)

    def lex(self, code: str, *, advance: bool) -> Lexer:
        """Return a lexer that yields the tokens of ``code``. With ``advance`` the next call's code follows it."""
        text = f"{self._last_opening_line}{code}\n"
        has_open_comment = self._has_c_comments and text.rfind("/*") > text.rfind("*/")
        closed_text = text + "*/" if has_open_comment else text  # a lexer recognizes closed comments only
        tokens = list(_tokens_between(self._lexer.get_tokens(closed_text), 0, len(text)))
        start = len(self._last_opening_line)
        if advance:
            self._last_opening_line = _opening_line(tokens)
        return _KnownTokens(list(_tokens_between(tokens, start, start + len(code))))


class _KnownTokens(Lexer):  # type: ignore[misc]
    """A lexer of one text whose tokens are known."""

    def __init__(self, tokens: Sequence[tuple[Any, str]]) -> None:
        super().__init__()
        self._tokens = tokens

    def get_tokens(self, text: str, unfiltered: bool = False) -> Iterator[tuple[Any, str]]:
        return iter(self._tokens)


def _tokens_between(tokens: Any, start: int, end: int) -> Iterator[tuple[Any, str]]:
    """Yield the tokens of the characters from ``start`` up to, not including, ``end``."""
    position = 0
    for kind, text in tokens:
        part = text[max(0, start - position) : max(0, end - position)]
        position += len(text)
        if part:
            yield kind, part


def _opening_line(tokens: Sequence[tuple[Any, str]]) -> str:
    """Return the line that begins the string or comment that is open at the end of the tokens; "" if none is open."""
    opening = line_so_far = ""
    for kind, text in tokens:
        can_span_lines = (kind in String or kind in Comment) and kind is not Comment.Single
        *line_ends, line_start = text.split("\n")
        for line_end in line_ends:
            if not can_span_lines:
                opening = ""
            elif not opening:  # the first line break inside the string or comment
                opening = f"{line_so_far}{line_end}\n"
            line_so_far = ""
        line_so_far += line_start
    return opening
