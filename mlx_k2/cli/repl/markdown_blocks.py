"""The blocks of a growing Markdown text. Only the last top-level block is parsed again. Knows no display."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode

from mlx_k2.cli.repl.chat_markdown import chat_parser

_EMPTY_BLOCK = Token("html_block", "", 0)
"""A token that rich does not print, but after which it prints an empty line before the next block."""
_SHORTEN_EVERY_LINES = 8
"""Number of lines by which an open block grows before it is shortened again."""
_NUM_OPENING_LINES = {"fence": 1, "paragraph": 1, "heading": 1, "code_block": 1, "html_block": 1, "table": 2}
"""Number of first lines by which a parser recognizes the block, for each kind of block that contains no blocks."""


class MarkdownBlocks:
    """The text of one answer, which has no control characters other than newline and tab.

    A link is resolved if its definition is in the text before the end of the link's block.
    """

    def __init__(self) -> None:
        self._parser = chat_parser()
        self._block_parser = MarkdownIt().enable("table").disable(["inline", "text_join"])  # finds blocks only
        self._references: dict[str, Any] = {}
        self.follows_block = False
        """True if an empty line is to be shown before the next block; set by the caller, for instance after a fence."""
        self._lines: list[str] = []  # all complete lines of the open block
        self._parsed_lines: list[str] = []  # those that are parsed and displayed: all, or all but a middle part
        self._last_line = ""  # incomplete
        self._has_new_lines = False
        self._is_fence = False
        self._inline_tokens: dict[str, list[Token]] = {}  # tokens inside the displayed paragraphs, by their text

    def add(self, text: str) -> None:
        """Append ``text``."""
        *lines, self._last_line = (self._last_line + text).split("\n")
        self._lines += lines
        self._parsed_lines += lines
        self._has_new_lines |= bool(lines)

    def pop_finished(self, keep_lines: int) -> list[Token]:
        """Remove the blocks that later text cannot change and return their tokens.

        Of a long open block, only the first lines and at least the last ``keep_lines`` lines are parsed again.
        """
        if not self._has_new_lines:
            return []
        self._has_new_lines = False
        start = self._find_open_block(self._parsed_lines)
        if start and len(self._parsed_lines) < len(self._lines):  # lines were dropped: find its index among all lines
            start = self._find_open_block(self._lines)
            self._parsed_lines = self._lines.copy()
        if start:
            finished_lines, self._lines = self._lines[:start], self._lines[start:]
            self._parsed_lines = self._lines.copy()
            return self._parse(finished_lines)
        if len(self._parsed_lines) > keep_lines + _SHORTEN_EVERY_LINES:
            self._shorten(keep_lines)
        return []

    def pop_fence(self) -> tuple[str, str] | None:
        """Remove an open code fence and return its first line and the text after that line; None if none is open."""
        if not self._is_fence:
            return None
        text = "\n".join([*self._lines[1:], self._last_line])
        first_line = self._lines[0]
        self._clear()
        return first_line, text

    def pop_rest(self) -> list[Token]:
        """Remove all text and return its tokens."""
        lines = [*self._lines, self._last_line]
        self._clear()
        return self._parse(lines)

    def open_tokens(self, max_chars: int) -> list[Token]:
        """Return the tokens of the end of the open block, with at most ``max_chars`` characters of each paragraph."""
        env = self._env()
        tokens = self._block_parser.parse("\n".join([*self._parsed_lines, self._last_line]), env)
        inline_tokens: dict[str, list[Token]] = {}
        for token in tokens:
            if token.type == "inline":
                text = token.content[-max_chars:]
                inline_tokens[text] = token.children = self._inline_tokens.get(text, [])
                if not token.children:
                    self._parser.inline.parse(text, self._parser, env, token.children)
        self._inline_tokens = inline_tokens
        return self._make_displayable(tokens)

    def _clear(self) -> None:
        self._lines, self._parsed_lines, self._last_line = [], [], ""
        self._has_new_lines = self._is_fence = False

    def _find_open_block(self, lines: list[str]) -> int:
        """Return the index of the line at which the last top-level block begins; set ``_is_fence`` for that block.

        Link definitions directly before the block belong to it: the next line may become a definition's title.
        """
        env = self._env()
        tokens = self._block_parser.parse("\n".join([*lines, ""]), env)
        blocks = [(token.map, token.type) for token in tokens if token.level == 0 and token.map]
        if not blocks:
            self._is_fence = False
            return 0
        (start, _), kind = blocks[-1]
        end_before = blocks[-2][0][1] if len(blocks) > 1 else 0
        definitions = [*env["references"].values(), *env.get("duplicate_refs", [])]
        for first, end in sorted((item["map"] for item in definitions if "map" in item), reverse=True):
            if end == start and first >= end_before:
                start, kind = first, "reference"
        self._is_fence = kind == "fence"
        return start

    def _parse(self, lines: list[str]) -> list[Token]:
        env = self._env()
        tokens = self._parser.parse("\n".join([*lines, ""]), env)
        self._references = {
            label: {"title": reference["title"], "href": reference["href"]}
            for label, reference in env["references"].items()
        }
        displayable_tokens = self._make_displayable(tokens)  # reads follows_block
        if tokens:
            self.follows_block = tokens[-1].type != "hr"  # as in rich's Markdown
        return displayable_tokens

    def _env(self) -> dict[str, Any]:
        """Return markdown-it's environment of a parse: the link definitions of the finished blocks."""
        return {"references": dict(self._references)}

    def _make_displayable(self, tokens: list[Token]) -> list[Token]:
        """Return the tokens with balanced <kbd> tags, and with an empty line before them if they follow a block."""
        for token in tokens:
            if token.children is not None:
                token.children = list(_balance_kbd(token.children))
        return [_EMPTY_BLOCK, *tokens] if tokens and self.follows_block else tokens

    def _shorten(self, keep_lines: int) -> None:
        """Drop the parsed lines that change neither the end of the open block nor the display of the end."""
        tokens = self._block_parser.parse("\n".join([*self._parsed_lines, ""]), self._env())
        blocks = SyntaxTreeNode(tokens).children
        if blocks:
            for start, end in sorted(_needless_lines(blocks[-1], 0, keep_lines), reverse=True):
                del self._parsed_lines[start:end]


def _balance_kbd(tokens: Sequence[Token]) -> Iterator[Token]:
    """Yield ``tokens`` with as many </kbd> as <kbd>; otherwise rich raises IndexError or styles all later blocks."""
    depth = 0
    for token in tokens:
        step = {"<kbd>": 1, "</kbd>": -1}.get(token.content, 0) if token.type == "html_inline" else 0
        if depth + step >= 0:
            depth += step
            yield token
    yield from [Token("html_inline", "", 0, content="</kbd>")] * depth


def _needless_lines(block: SyntaxTreeNode, first: int, keep_lines: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of lines, at or after ``first``, without which a parser finds the same end of ``block``.

    The last ``keep_lines`` lines stay. Of the lines before them, the first line of each enclosing block stays, because
    it has the marker of the block.
    """
    assert block.map is not None
    start, end = block.map
    children = block.children
    if block.type in _NUM_OPENING_LINES:
        yield from _nonempty_range(max(first, start + _NUM_OPENING_LINES[block.type]), end - keep_lines)
    elif children:
        first_kept_child = next((child for child in children if end - _start(child) <= keep_lines), children[-1])
        if block.type in ("bullet_list", "ordered_list"):
            yield from _nonempty_range(max(first, start), _start(first_kept_child))
        else:
            first_child = children[0]
            assert first_child.map is not None
            child_start, child_end = first_child.map
            if first_child.type in ("paragraph", "heading"):  # the first line is enough to find the end
                child_end = child_start + 1
            # the empty line before the kept child stays, because it separates the two
            yield from _nonempty_range(max(first, child_end), _start(first_kept_child) - 1)
        if first_kept_child is children[-1]:
            marker_lines = 1 if first_kept_child.type == "list_item" else 0
            yield from _needless_lines(
                first_kept_child, max(first, _start(first_kept_child) + marker_lines), keep_lines
            )


def _start(block: SyntaxTreeNode) -> int:
    assert block.map is not None
    return block.map[0]


def _nonempty_range(start: int, end: int) -> Iterable[tuple[int, int]]:
    """Return a list with the range, which is empty for an empty range."""
    return [(start, end)] if start < end else []
