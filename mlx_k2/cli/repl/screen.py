"""What a chat shows: on a terminal with colours, and plainly everywhere else. Knows no session."""

import sys
from collections.abc import Callable, Iterable
from typing import Protocol

from rich.console import Console
from rich.status import Status
from rich.text import Text

from mlx_k2.chat.chat_events import CallEnded, CallStarted, Event
from mlx_k2.cli.console import console as talk
from mlx_k2.cli.console import log, log_restart
from mlx_k2.cli.repl.markdown_stream import MarkdownStream
from mlx_k2.cli.repl.wording import call_line, ended_line, printable
from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.deployment.restarting import Restart
from mlx_k2.text.reply_parser import Content, Reasoning


def show_all(show: Callable[[Event], None], events: Iterable[Event]) -> list[AnswerSummary]:
    """Call ``show`` with each event as it comes; return the summaries among them."""
    summaries = []
    for event in events:
        show(event)
        if isinstance(event, AnswerSummary):
            summaries.append(event)
    return summaries


class Screen(Protocol):
    """Shows one answer after the other."""

    show_thinking: bool

    def event(self, event: Event) -> None:
        """Show one event."""

    def log(self, line: str) -> None:
        """A word beside the matter."""

    def restart(self, restart: Restart) -> None:
        """All stages start again."""

    def wait(self, what: str) -> None:
        """Nothing is to be seen until something comes; ``what`` is waited for."""

    def pause(self) -> None:
        """Whole lines, and nothing that moves: the user is asked something, or the answer is over."""


class PlainScreen:
    """The answer to stdout, everything else to stderr, dim where that is a terminal with colours."""

    def __init__(self, *, show_thinking: bool) -> None:
        self.show_thinking = show_thinking
        self._open: type[Reasoning] | type[Content] | None = None

    def event(self, event: Event) -> None:
        """Write one event."""
        match event:
            case Reasoning(text) if self.show_thinking:
                self._write(Reasoning, text)
            case Content(text):
                self._write(Content, text)
            case CallStarted() | AnswerSummary():
                self.pause()
            case CallEnded():
                self.log(ended_line(event))

    def log(self, line: str) -> None:
        """A line on stderr; on a terminal below the words so far, which are no complete line."""
        self._begin_line()
        log(printable(line))

    def restart(self, restart: Restart) -> None:
        """Two lines on stderr, in the same way."""
        self._begin_line()
        log_restart(restart)

    def wait(self, what: str) -> None:
        """Nothing moves here."""

    def pause(self) -> None:
        """End the line that is open."""
        if self._open is not None:
            self._write(self._open, "\n")
            self._open = None

    def _begin_line(self) -> None:
        if self._open is Reasoning:
            self.pause()
        elif self._open is Content and talk.is_terminal:
            talk.print()

    def _write(self, kind: type[Reasoning] | type[Content], text: str) -> None:
        if self._open not in (None, kind):
            self.pause()
        self._open = kind
        if kind is Reasoning:
            talk.print(Text(printable(text), style="dim"), end="", soft_wrap=True)
        else:
            sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()


class RichScreen:
    """Thoughts dim, the answer as Markdown, a call as one line; what is waited for beside a spinner."""

    def __init__(self, *, show_thinking: bool) -> None:
        self.show_thinking = show_thinking
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._markdown = MarkdownStream(self._console)
        self._status: Status | None = None
        self._is_thinking = False
        self._num_hidden = 0
        self._running = 0

    def event(self, event: Event) -> None:
        """Show it as it comes."""
        match event:
            case Reasoning(text) if self.show_thinking:
                self._spin(None)
                self._markdown.close()
                self._is_thinking = True
                self._console.print(Text(printable(text), style="dim italic"), end="", soft_wrap=True)
            case Reasoning():
                self._num_hidden += 1
                self._spin(f"thinking, {self._num_hidden} pieces of text so far (/think show)")
            case Content(text):
                self._spin(None)
                self._end_thinking()
                self._markdown.add(printable(text))
            case CallStarted(call):
                self._running += 1
                self._spin(call_line(call) if self._running == 1 else f"{self._running} tools run")
            case CallEnded():
                self._running = max(0, self._running - 1)
                self.log(f"⚙ {ended_line(event)}")
                if self._running:
                    self._spin(f"{self._running} tools run")
            case AnswerSummary():
                self.pause()

    def wait(self, what: str) -> None:
        """A spinner beside ``what`` until something comes."""
        self._spin(what)

    def log(self, line: str) -> None:
        """A dim line."""
        self.pause()
        self._console.print(Text(printable(line), style="dim"), soft_wrap=True)

    def restart(self, restart: Restart) -> None:
        """Two dim lines."""
        self.pause()
        log_restart(restart)

    def pause(self) -> None:
        """End what is open."""
        self._spin(None)
        self._end_thinking()
        self._markdown.close()
        self._num_hidden = 0

    def _end_thinking(self) -> None:
        if self._is_thinking:
            self._is_thinking = False
            self._console.print("\n")

    def _spin(self, what: str | None) -> None:
        if what is None:
            if self._status is not None:
                self._status.stop()
            self._status = None
        elif self._status is not None:
            self._status.update(Text(what, style="dim"))
        else:
            self._end_thinking()
            self._markdown.close()
            self._status = self._console.status(Text(what, style="dim"))
            self._status.start()
