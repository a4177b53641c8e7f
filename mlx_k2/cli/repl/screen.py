"""Display of a chat: with colours and Markdown on a terminal, plain elsewhere. Knows no session."""

import sys
from abc import ABC, abstractmethod

from rich.status import Status
from rich.text import Text

from mlx_k2.chat.chat_events import CallEnded, CallStarted, Event
from mlx_k2.cli.console import console as stderr_console
from mlx_k2.cli.console import log_restart
from mlx_k2.cli.repl.markdown_stream import MarkdownStream
from mlx_k2.cli.repl.wording import call_line, ended_line, progress_line
from mlx_k2.cli.safe_console import SafeConsole
from mlx_k2.cli.streams import is_dumb, is_terminal, refuses_colour
from mlx_k2.cli.terminal_text import printable
from mlx_k2.cli.word_wrap import WordWrap
from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.handle import PrefillProgress, Queued, Restarting, Token
from mlx_k2.deployment.restarting import Restart
from mlx_k2.text.reply_parts import Content, Reasoning


class Screen(ABC):
    """A display of one answer after the other. Lines and the spinner are on ``console``."""

    def __init__(self, console: SafeConsole, *, show_thinking: bool) -> None:
        self.show_thinking = show_thinking
        self.is_answering = False
        """True from a message of the user until its answer has ended, tool calls included."""
        self._console = console
        self._status: Status | None = None
        self._last_restart: Restart | None = None

    def event(self, event: Event) -> None:
        """Show one event at once. Here: progress, and a line for each restart."""
        if isinstance(event, Queued | PrefillProgress | Restarting):
            if isinstance(event, Restarting) and event.restart != self._last_restart:
                self._last_restart = event.restart
                self.restart(event.restart)
            self.wait(progress_line(event))

    def log(self, line: str) -> None:
        """Show a dim line that is not part of the answer."""
        self._begin_line()
        self._console.print(Text(printable(line), style="dim"), soft_wrap=True)

    def show_call(self, text: str) -> None:
        """Show a tool call that the user is asked about, in normal weight."""
        self._begin_line()
        self._console.print(text, soft_wrap=True)

    def restart(self, restart: Restart) -> None:
        """Show that all stages start again."""
        self._begin_line()
        log_restart(restart)

    def wait(self, what: str) -> None:
        """Show a spinner before ``what`` until the next output."""
        self._spin(what)

    @abstractmethod
    def pause(self) -> None:
        """End the current line and stop the spinner. Called before a question and at the end of an answer."""

    def _begin_line(self) -> None:
        """Stop the spinner, and go to the beginning of a line."""
        self.pause()

    @abstractmethod
    def _end_text(self) -> None:
        """Go to the beginning of a line, where a spinner can be shown."""

    def _spin(self, what: str | None) -> None:
        """Show a spinner before ``what`` if the console is a terminal; None: stop it."""
        if what is None:
            if self._status is not None:
                self._status.stop()
            self._status = None
        elif self._status is not None:
            self._status.update(Text(what, style="dim"))
        elif self._console.is_terminal:
            self._end_text()
            self._status = self._console.status(Text(what, style="dim"))
            self._status.start()


class PlainScreen(Screen):
    """A plain display: the answer on stdout, all else on stderr, dim if that is a terminal with colours."""

    def __init__(self, *, show_thinking: bool) -> None:
        super().__init__(stderr_console, show_thinking=show_thinking)
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
            case _:
                super().event(event)

    def pause(self) -> None:
        """Stop the spinner, and end the incomplete line if there is one."""
        self._spin(None)
        if self._open is not None:
            self._write(self._open, "\n")
            self._open = None

    def _begin_line(self) -> None:
        self._spin(None)
        self._end_text()

    def _end_text(self) -> None:
        """End a line of reasoning; on a terminal, go below the incomplete line of the answer."""
        if self._open is Reasoning:
            self.pause()
        elif self._open is Content and self._console.is_terminal:
            self._console.print()

    def _write(self, kind: type[Reasoning] | type[Content], text: str) -> None:
        self._spin(None)
        if self._open not in (None, kind):
            self.pause()
        self._open = kind
        if kind is Reasoning:
            self._console.print(Text(printable(text), style="dim"), end="", soft_wrap=True)
        else:
            sys.stdout.write(printable(text) if is_terminal(sys.stdout) else text)
            sys.stdout.flush()


class RichScreen(Screen):
    """A display with colours: reasoning dim, the answer as Markdown, a call as one line, a spinner while waiting."""

    def __init__(self, *, show_thinking: bool) -> None:
        super().__init__(SafeConsole(highlight=False, markup=False, emoji=False), show_thinking=show_thinking)
        self._markdown = MarkdownStream(self._console)
        self._wrap = WordWrap()
        self._thinking_since: tuple[int, float] | None = None
        """The number of tokens before the reasoning of the present reply, and the time at which it began."""
        self._thoughts = ""
        """How many tokens of reasoning there are, and their seconds."""
        self._num_tokens = 0
        self._arrived_at = 0.0
        self._running = 0

    def event(self, event: Event) -> None:
        """Show one event at once."""
        match event:
            case Token(arrived_at=arrived_at):
                self._num_tokens += 1
                self._arrived_at = arrived_at
            case Reasoning(text):
                self._think(text)
            case Content(text):
                self._spin(None)
                self._end_thinking()
                self._markdown.add(printable(text))
            case CallStarted(call):
                self._running += 1
                self._end_thinking()
                self._spin(call_line(call) if self._running == 1 else f"{self._running} tools run")
            case CallEnded():
                self._running = max(0, self._running - 1)
                self.log(f"⚙ {ended_line(event)}")
                if self._running:
                    self._spin(f"{self._running} tools run")
            case AnswerSummary():
                self.pause()
            case _:
                super().event(event)

    def wait(self, what: str) -> None:
        """Show a spinner before ``what`` until the next output."""
        self._end_thinking()
        self._spin(what)

    def pause(self) -> None:
        """Stop the spinner, and end the reasoning and the answer."""
        self._spin(None)
        self._end_thinking()
        self._end_text()

    def _end_text(self) -> None:
        self._markdown.close()

    def _think(self, text: str) -> None:
        """Show further reasoning, or how much of it there is."""
        if self._thinking_since is None:
            self._markdown.close()
            self._thinking_since = self._num_tokens - 1, self._arrived_at
        tokens_before, began = self._thinking_since
        self._thoughts = f"thinking: {self._num_tokens - tokens_before} tokens, {self._arrived_at - began:.0f} s"
        if self.show_thinking:
            self._spin(None)
            self._print_thought(self._wrap.add(printable(text), self._console.width))
        else:
            self._spin(f"{self._thoughts} so far (/think show)")

    def _end_thinking(self) -> None:
        if self._thinking_since is not None:
            self._thinking_since = None
            self._spin(None)
            if self.show_thinking:
                self._print_thought(f"{self._wrap.rest(self._console.width)}\n")
            self._console.print(Text(self._thoughts, style="dim"), end="\n\n", soft_wrap=True)

    def _print_thought(self, text: str) -> None:
        self._console.print(Text(text, style="dim italic"), end="", soft_wrap=True)


def choose_screen(*, show_thinking: bool) -> Screen:
    """Return a plain screen if stdout is not a terminal, or a dumb one, or with NO_COLOR; else one with colours."""
    plain = not is_terminal(sys.stdout) or refuses_colour() or is_dumb()
    return (PlainScreen if plain else RichScreen)(show_thinking=show_thinking)
