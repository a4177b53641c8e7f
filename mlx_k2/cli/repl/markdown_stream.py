"""Streamed display of Markdown: complete blocks are printed once, the last one is redrawn. Knows no model."""

import re

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

_FENCE = re.compile(r" {0,3}(```|~~~)")
# A line that may belong to the block above the blank line before it: a further list item, or a paragraph of one.
_MAY_CONTINUE = re.compile(r"[\s\d*+-]")
_MARGIN_LINES = 2


class MarkdownStream:
    """The display of one answer on ``console``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pending = ""
        self._live: Live | None = None
        self._is_first = True

    def add(self, text: str) -> None:
        """Append ``text`` to the answer and update the display."""
        self._pending += text
        end = end_of_whole_blocks(self._pending)
        if end:
            whole, self._pending = self._pending[:end], self._pending[end:]
            self._print(whole)
        if self._live is None:
            self._live = Live(console=self._console, transient=True, refresh_per_second=10)
            self._live.start()
        self._live.update(_Tail(self._pending))

    def close(self) -> None:
        """End the answer and print its remaining text."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._pending.strip():
            self._print(self._pending)
        self._pending, self._is_first = "", True

    def _print(self, text: str) -> None:
        if not self._is_first:
            self._console.print()
        self._is_first = False
        self._console.print(Markdown(text))


def end_of_whole_blocks(text: str) -> int:
    """Return the index at which the last block of ``text`` begins, which may still grow; 0 if it is the only block."""
    end = position = 0
    in_fence = after_blank = False
    for line in text.splitlines(keepends=True):
        if _FENCE.match(line):
            in_fence = not in_fence
        elif not in_fence and after_blank and line.strip() and not _MAY_CONTINUE.match(line):
            end = position
        if _FENCE.match(line) and in_fence and after_blank:
            end = position
        after_blank = not line.strip()
        position += len(line)
    return end


class _Tail:
    """The last lines of a block, as many as fit on the screen."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(Markdown(self._text), options.update(height=None), pad=False)
        for line in lines[-max(1, console.size.height - _MARGIN_LINES) :]:
            yield from line
            yield Segment.line()
