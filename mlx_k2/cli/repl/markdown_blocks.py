"""The blocks of a Markdown text that grows. Parses only the last top-level block again. Knows no display."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode

from mlx_k2.cli.repl.chat_markdown import chat_parser

_AFTER_A_BLOCK = Token("html_block", "", 0)
"""A token that rich prints as nothing, and after which it prints an empty line before the next block."""
_SHORTEN_EVERY = 8
"""Number of lines by which an open block grows before it is shortened again."""
_LEAVES = {"fence": 1, "paragraph": 1, "heading": 1, "code_block": 1, "html_block": 1, "table": 2}
"""The kinds of blocks that contain no blocks, and how many first lines a parser needs to know the kind."""


class MarkdownBlocks:
    """The text of one answer, which has no control characters other than newline and tab.

    A link is resolved if its definition is in the text before the end of the link's block.
    """

    def __init__(self) -> None:
        self._parser = chat_parser()
        self._block_parser = MarkdownIt().enable("table").disable(["inline", "text_join"])
        self._references: dict[str, Any] = {}
        self.follows_block = False
        """True if an empty line is to be shown before the next block; set by the caller, for instance after a fence."""
        self._lines: list[str] = []  # all complete lines of the open block
        self._kept: list[str] = []  # those of them that are still parsed and displayed
        self._last_line = ""  # incomplete
        self._has_new_lines = False
        self._is_fence = False
        self._shown: dict[str, list[Token]] = {}  # tokens of the displayed paragraphs, by their text

    def add(self, text: str) -> None:
        """Append ``text``."""
        *lines, self._last_line = (self._last_line + text).split("\n")
        self._lines += lines
        self._kept += lines
        self._has_new_lines |= bool(lines)

    def pop_finished(self, keep_lines: int) -> list[Token]:
        """Remove the blocks that later text cannot change and return their tokens.

        Of a block that is still open the last ``keep_lines`` lines are kept, and at most about twice as many parsed.
        """
        if not self._has_new_lines:
            return []
        self._has_new_lines = False
        start = self._find_open_block(self._kept)
        if start and len(self._kept) < len(self._lines):
            start = self._find_open_block(self._lines)
            self._kept = self._lines.copy()
        if start:
            finished, self._lines = self._lines[:start], self._lines[start:]
            self._kept = self._lines.copy()
            return self._parse(finished)
        if len(self._kept) > keep_lines + _SHORTEN_EVERY:
            self._shorten(keep_lines)
        return []

    def pop_fence(self) -> tuple[str, str] | None:
        """Remove an open block that is a code fence; return its first line and the text after it, else None."""
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
        tokens = self._block_parser.parse("\n".join([*self._kept, self._last_line]), env)
        shown: dict[str, list[Token]] = {}
        for token in tokens:
            if token.type == "inline":
                text = token.content[-max_chars:]
                shown[text] = token.children = self._shown.get(text, [])
                if not token.children:
                    self._parser.inline.parse(text, self._parser, env, token.children)
        self._shown = shown
        return self._displayable(tokens)

    def _clear(self) -> None:
        self._lines, self._kept, self._last_line = [], [], ""
        self._has_new_lines = self._is_fence = False

    def _find_open_block(self, lines: list[str]) -> int:
        """Return the line at which the last top-level block begins.

        Definitions of links directly before it belong to it: the next line may become the title of the last definition.
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
        placed = self._displayable(tokens)
        if tokens:
            self.follows_block = tokens[-1].type != "hr"  # as in rich's Markdown
        return placed

    def _env(self) -> dict[str, Any]:
        return {"references": dict(self._references)}

    def _displayable(self, tokens: list[Token]) -> list[Token]:
        """Return the tokens with balanced <kbd> tags, and an empty line before them if one is due."""
        for token in tokens:
            if token.children is not None:
                token.children = list(_balanced(token.children))
        return [_AFTER_A_BLOCK, *tokens] if tokens and self.follows_block else tokens

    def _shorten(self, keep_lines: int) -> None:
        """Remove lines of the open block that change neither where it ends nor how its end is displayed."""
        blocks = SyntaxTreeNode(self._block_parser.parse("\n".join([*self._kept, ""]), self._env())).children
        if blocks:
            for start, end in sorted(_needless_lines(blocks[-1], 0, keep_lines), reverse=True):
                del self._kept[start:end]


def _balanced(tokens: Sequence[Token]) -> Iterator[Token]:
    """Yield ``tokens`` with as many </kbd> as <kbd>. Else rich raises IndexError or styles all later blocks."""
    depth = 0
    for token in tokens:
        step = {"<kbd>": 1, "</kbd>": -1}.get(token.content, 0) if token.type == "html_inline" else 0
        if depth + step >= 0:
            depth += step
            yield token
    yield from [Token("html_inline", "", 0, content="</kbd>")] * depth


def _needless_lines(block: SyntaxTreeNode, first: int, keep_lines: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of lines, from line ``first`` on, without which a parser finds the same end of ``block``.

    The last ``keep_lines`` lines stay. Before them only the first line of each enclosing block stays, which has its
    marker.
    """
    assert block.map is not None
    start, end = block.map
    children = block.children
    if block.type in _LEAVES:
        yield from _range(max(first, start + _LEAVES[block.type]), end - keep_lines)
    elif children:
        shown = next((child for child in children if end - _start(child) <= keep_lines), children[-1])
        if block.type in ("bullet_list", "ordered_list"):
            yield from _range(max(first, start), _start(shown))
        else:
            head = children[0]
            assert head.map is not None
            after_head = head.map[0] + 1 if head.type in ("paragraph", "heading") else head.map[1]
            yield from _range(max(first, after_head), _start(shown) - 1)
        if shown is children[-1]:
            marker_lines = 1 if shown.type == "list_item" else 0
            yield from _needless_lines(shown, max(first, _start(shown) + marker_lines), keep_lines)


def _start(block: SyntaxTreeNode) -> int:
    assert block.map is not None
    return block.map[0]


def _range(start: int, end: int) -> Iterable[tuple[int, int]]:
    return [(start, end)] if start < end else []
