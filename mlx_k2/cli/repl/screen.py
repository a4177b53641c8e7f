"""Display of a chat: with colours and Markdown on a terminal, else plain. Knows no session."""

import sys
from abc import ABC, abstractmethod

from rich.status import Status
from rich.text import Text

from mlx_k2.chat.chat_events import CallEnded, CallStarted, Event
from mlx_k2.cli.console import console as stderr_console
from mlx_k2.cli.console import log_restart
from mlx_k2.cli.repl.markdown_stream import MarkdownStream
from mlx_k2.cli.repl.wording import call_line, ended_call_line, progress_line
from mlx_k2.cli.safe_console import SafeConsole
from mlx_k2.cli.streams import is_dumb, is_terminal, refuses_colour
from mlx_k2.cli.terminal_text import printable
from mlx_k2.cli.word_wrap import WordWrap
from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.handle import PrefillProgress, Queued, Restarting, Token
from mlx_k2.deployment.restarting import Restart
from mlx_k2.text.reply_parts import Content, Reasoning


class Screen(ABC):
    """A display of the answers of a chat. Lines that are no part of an answer, and the spinner, go to ``console``."""

    def __init__(self, console: SafeConsole, *, show_thinking: bool) -> None:
        self.show_thinking = show_thinking
        self.is_answering = False
        """True from a message of the user until its answer has ended, tool calls included."""
        self._console = console
        self._status: Status | None = None
        self._last_restart: Restart | None = None

    def show_event(self, event: Event) -> None:
        """Show one event at once. This base class shows progress, and a line for each restart."""
        if isinstance(event, Queued | PrefillProgress | Restarting):
            if isinstance(event, Restarting) and event.restart != self._last_restart:
                self._last_restart = event.restart
                self.show_restart(event.restart)
            self.show_waiting(progress_line(event))

    def log(self, line: str) -> None:
        """Show a dim line that is not part of the answer."""
        self._begin_line()
        self._console.print(Text(printable(line), style="dim"), soft_wrap=True)

    def show_call(self, text: str) -> None:
        """Show a tool call that the user has to approve. Unlike other lines, it is not dim."""
        self._begin_line()
        self._console.print(text, soft_wrap=True)

    def show_restart(self, restart: Restart) -> None:
        """Show that all stages start again."""
        self._begin_line()
        log_restart(restart)

    def show_waiting(self, text: str) -> None:
        """Show a spinner before ``text`` until the next output."""
        self._spin(text)

    @abstractmethod
    def pause(self) -> None:
        """End the current line and stop the spinner. Called before a question and at the end of an answer."""

    def _begin_line(self) -> None:
        """Stop the spinner, and go to the beginning of a line."""
        self.pause()

    @abstractmethod
    def _end_text(self) -> None:
        """Go to the beginning of a line, where a spinner can be shown."""

    def _spin(self, text: str) -> None:
        """Show a spinner before ``text`` if the console is a terminal."""
        if self._status is not None:
            self._status.update(Text(text, style="dim"))
        elif self._console.is_terminal:
            self._end_text()
            self._status = self._console.status(Text(text, style="dim"))
            self._status.start()

    def _stop_spinner(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


class PlainScreen(Screen):
    """A plain display: the answer on stdout, all else on stderr, dim if that is a terminal with colours."""

    def __init__(self, *, show_thinking: bool) -> None:
        super().__init__(stderr_console, show_thinking=show_thinking)
        self._line_kind: type[Reasoning] | type[Content] | None = None
        """The kind of the text in the incomplete line; None at the beginning of a line."""

    def show_event(self, event: Event) -> None:
        """Write one event."""
        match event:
            case Reasoning(text) if self.show_thinking:
                self._write(Reasoning, text)
            case Content(text):
                self._write(Content, text)
            case CallStarted() | AnswerSummary():
                self.pause()
            case CallEnded():
                self.log(ended_call_line(event))
            case _:
                super().show_event(event)

    def pause(self) -> None:
        """Stop the spinner, and end the incomplete line if there is one."""
        self._stop_spinner()
        if self._line_kind is not None:
            self._write(self._line_kind, "\n")
            self._line_kind = None

    def _begin_line(self) -> None:
        self._stop_spinner()
        self._end_text()

    def _end_text(self) -> None:
        """End a line of reasoning. For a line of the answer, write the line end to stderr, if that is a terminal.

        On stdout the answer later continues in the same line.
        """
        if self._line_kind is Reasoning:
            self.pause()
        elif self._line_kind is Content and self._console.is_terminal:
            self._console.print()

    def _write(self, kind: type[Reasoning] | type[Content], text: str) -> None:
        self._stop_spinner()
        if self._line_kind not in (None, kind):
            self.pause()
        self._line_kind = kind
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
        """The number of tokens before the reasoning of the present reply, and the arrival time of its first token."""
        self._thinking_summary = ""
        """The line with the number of tokens of the reasoning, and its seconds."""
        self._num_tokens = 0
        self._arrived_at = 0.0
        self._num_running_calls = 0

    def show_event(self, event: Event) -> None:
        """Show one event at once."""
        match event:
            case Token(arrived_at=arrived_at):
                self._num_tokens += 1
                self._arrived_at = arrived_at
            case Reasoning(text):
                self._think(text)
            case Content(text):
                self._stop_spinner()
                self._end_thinking()
                self._markdown.add(printable(text))
            case CallStarted(call):
                self._num_running_calls += 1
                self._end_thinking()
                num_calls = self._num_running_calls
                self._spin(call_line(call) if num_calls == 1 else f"{num_calls} tools run")
            case CallEnded():
                self._num_running_calls = max(0, self._num_running_calls - 1)  # a refused call was not started
                self.log(f"⚙ {ended_call_line(event)}")
                if self._num_running_calls:
                    self._spin(f"{self._num_running_calls} tools run")
            case AnswerSummary():
                self.pause()
            case _:
                super().show_event(event)

    def show_waiting(self, text: str) -> None:
        """End the reasoning, and show a spinner before ``text`` until the next output."""
        self._end_thinking()
        self._spin(text)

    def pause(self) -> None:
        """Stop the spinner, and end the reasoning and the answer."""
        self._stop_spinner()
        self._end_thinking()
        self._end_text()

    def _end_text(self) -> None:
        self._markdown.close()

    def _think(self, text: str) -> None:
        """Show further reasoning, or a spinner with the amount of reasoning."""
        if self._thinking_since is None:
            self._markdown.close()
            self._thinking_since = self._num_tokens - 1, self._arrived_at
        tokens_before, started_at = self._thinking_since
        num_tokens, seconds = self._num_tokens - tokens_before, self._arrived_at - started_at
        self._thinking_summary = f"thinking: {num_tokens} tokens, {seconds:.0f} s"
        if self.show_thinking:
            self._stop_spinner()
            self._print_reasoning(self._wrap.add(printable(text), self._console.width))
        else:
            self._spin(f"{self._thinking_summary} so far (/think show)")

    def _end_thinking(self) -> None:
        if self._thinking_since is not None:
            self._thinking_since = None
            self._stop_spinner()
            if self.show_thinking:
                self._print_reasoning(f"{self._wrap.rest(self._console.width)}\n")
            self._console.print(Text(self._thinking_summary, style="dim"), end="\n\n", soft_wrap=True)

    def _print_reasoning(self, text: str) -> None:
        self._console.print(Text(text, style="dim italic"), end="", soft_wrap=True)


def choose_screen(*, show_thinking: bool) -> Screen:
    """Return a plain screen if stdout is not a terminal, or a dumb one, or with NO_COLOR; else one with colours."""
    if not is_terminal(sys.stdout) or refuses_colour() or is_dumb():
        return PlainScreen(show_thinking=show_thinking)
    return RichScreen(show_thinking=show_thinking)
