"""Streamed display of Markdown. Prints finished blocks and lines of code once, redraws the rest. Knows no model."""

import threading
import time
from collections.abc import Iterator, Sequence

from rich.console import Console, RenderableType
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment, SegmentLines, Segments

from mlx_k2.cli.repl.chat_markdown import ChatMarkdown
from mlx_k2.cli.repl.markdown_blocks import MarkdownBlocks
from mlx_k2.cli.repl.streamed_code import StreamedCode

_MIN_PAUSE_S = 0.1
_MAX_CPU_FRACTION = 0.1
"""Maximum fraction of one core that refreshes use. A long refresh is followed by a long pause."""
_MARGIN_LINES = 2
"""Lines of the terminal that are left free below the redrawn text."""


class MarkdownStream:
    """The display of the answers of a chat on ``console``. A separate thread refreshes it, at most every 0.1 s."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._thread: threading.Thread | None = None

    def add(self, text: str) -> None:
        """Append ``text`` to the answer. The display follows within 0.1 s, unless the terminal is slow."""
        if self._thread is None:
            self._display = MarkdownDisplay(self._console)
            self._has_text, self._is_closing = threading.Event(), threading.Event()
            self._thread = threading.Thread(target=self._refresh_until_closed, name="markdown", daemon=True)
            self._thread.start()
        self._display.add(text)
        self._has_text.set()

    def close(self) -> None:
        """End the answer and print its remaining text."""
        if self._thread is not None:
            self._is_closing.set()
            self._has_text.set()
            self._thread.join()
            self._thread = None
            self._display.close()

    def _refresh_until_closed(self) -> None:
        pause_s = 0.0
        while not self._is_closing.wait(pause_s):
            self._has_text.wait()
            self._has_text.clear()
            started_at = time.thread_time()
            self._display.refresh()
            pause_s = max(_MIN_PAUSE_S, (time.thread_time() - started_at) / _MAX_CPU_FRACTION)


class MarkdownDisplay:
    """The display of one answer. ``add`` may be called by one thread while another refreshes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, transient=True, auto_refresh=False)
        self._new_texts: list[str] = []
        self._blocks = MarkdownBlocks()
        self._code: StreamedCode | None = None
        self._shown_lengths: Sequence[int] = ()
        """The columns of each redrawn line on the terminal, and the terminal's width when they were printed."""
        self._shown_width = console.width
        self._live.start()

    def add(self, text: str) -> None:
        """Append ``text`` to the answer."""
        self._new_texts.append(text)

    def refresh(self) -> None:
        """Print the finished parts, and redraw the end of the unfinished part."""
        max_lines = max(1, self._console.size.height - _MARGIN_LINES)
        finished_parts = list(self._pop_finished(max_lines))
        if self._code is not None:
            unfinished: RenderableType = self._code.last_lines(max_lines)
        else:
            unfinished = ChatMarkdown(self._blocks.open_tokens(max_chars=max_lines * self._console.width))
        options = self._console.options.update(height=None)
        lines = self._console.render_lines(unfinished, options, pad=False)
        self._erase_rewrapped_lines()
        self._show(finished_parts, SegmentLines(lines[-max_lines:], new_lines=True))
        self._shown_lengths = [Segment.get_line_length(line) for line in lines[-max_lines:]]
        self._shown_width = options.max_width

    def close(self) -> None:
        """Print the rest of the answer and end the display."""
        finished_parts = list(self._pop_finished(max_lines=self._console.size.height))
        finished_parts.append(ChatMarkdown(self._blocks.pop_rest()) if self._code is None else self._code.pop_rest())
        self._erase_rewrapped_lines()
        self._show(finished_parts, "")
        self._live.stop()

    def _pop_finished(self, max_lines: int) -> Iterator[RenderableType]:
        """Read the added text; yield the finished blocks and lines of code."""
        num_texts = len(self._new_texts)  # another thread may append more meanwhile
        text = "".join(self._new_texts[:num_texts])
        del self._new_texts[:num_texts]
        while True:
            if self._code is None:
                self._blocks.add(text)
                if tokens := self._blocks.pop_finished(max_lines):
                    yield ChatMarkdown(tokens)
                if (fence := self._blocks.pop_fence()) is None:
                    return
                if self._blocks.follows_block:
                    yield Segments([Segment.line()])
                first_line, text = fence
                self._code = StreamedCode(first_line)
            self._code.add(text)
            if self._code.rest is None:
                if (code := self._code.pop_complete()) is not None:
                    yield code
                return
            yield self._code.pop_rest()
            text, self._code = self._code.rest, None
            self._blocks.follows_block = True

    def _erase_rewrapped_lines(self) -> None:
        """After the terminal became narrower, erase the lines that its own wrapping added to the redrawn ones."""
        width = self._console.width
        if width < self._shown_width:
            num_lines = sum(max(0, length - 1) // width for length in self._shown_lengths)
            one_line_up = ((ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2))
            self._console.control(Control(*one_line_up * num_lines))

    def _show(self, finished: Sequence[RenderableType], unfinished: RenderableType) -> None:
        """Print ``finished`` above ``unfinished``, in one write."""
        with self._console:
            self._live.update(unfinished)
            if finished:
                self._console.print(*finished, sep="", end="")
            self._live.refresh()
