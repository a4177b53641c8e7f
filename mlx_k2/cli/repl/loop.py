"""The chat loop: read a line, answer it, show the answer. Knows neither options nor stages."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from mlx_k2.chat.chat_events import Event
from mlx_k2.cli.repl.commands import Commands, Quit, is_command
from mlx_k2.cli.repl.keyboard import LineKeyboard
from mlx_k2.cli.repl.transcript import Transcript
from mlx_k2.cli.repl.wording import CUT_TEXTS
from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.errors import EngineBusy, RequestFailed, SetupError
from mlx_k2.scheduling.request import FinishReason
from mlx_k2.text.tokenizer import well_formed
from mlx_k2.text.tool_call import ToolCall

_FINISH_TEXTS = {**CUT_TEXTS, FinishReason.CANCELLED: "stopped; /retry answers again, /undo removes your message"}
_QUIT_PRESSES = 3
"""Number of Ctrl-C presses during one answer that ends the program, in case the answer does not stop."""


class Repl:
    """One chat on one terminal, or over a pipe."""

    def __init__(self, commands: Commands, keyboard: LineKeyboard, transcript: Transcript | None) -> None:
        self._session = commands.session
        self._commands = commands
        self._keyboard = keyboard
        self._screen = commands.screen
        self._usage = commands.usage
        self._transcript = transcript
        self.has_failed = False
        """Whether a message or a command has failed."""

    def run(self, first_message: str | None = None) -> None:
        """Send ``first_message``, then run until the user quits or the input ends.

        Raises:
            ClusterError: the stages cannot continue; the conversation so far is in the session.
        """
        while True:
            self._session.prefill_next_prompt()
            try:
                if first_message is None:
                    self._handle_line(self._keyboard.read())
                else:
                    message, first_message = first_message, None
                    self._send(message)
            except KeyboardInterrupt:
                continue
            except (EOFError, Quit):
                return
            except (SetupError, RequestFailed, EngineBusy) as error:
                self.has_failed = True
                can_retry = not isinstance(error, SetupError)
                self._screen.log(f"error: {error}{'; /retry answers your message again' if can_retry else ''}")

    def _handle_line(self, line: str) -> None:
        """Run a command line, or send a message."""
        if is_command(line):
            if self._transcript is not None:
                self._transcript.write({"command": well_formed(line)})
            self._show_events(self._commands.run(line.strip()))
        elif line.strip():
            self._send(line)

    def _send(self, message: str) -> None:
        self._show_events(self._session.send_message(well_formed(message.strip())))

    def _show_events(self, events: Iterable[Event]) -> None:
        """Show all events, count them, and write them to the transcript."""
        summary: AnswerSummary | None = None
        has_call_without_tools = False
        with self._ctrl_c_stops():
            self._screen.is_answering = True
            try:
                for event in events:
                    self._usage.add(event)
                    if self._transcript is not None:
                        self._transcript.write_event(event)
                    self._screen.show_event(event)
                    if isinstance(event, AnswerSummary):
                        summary = event
                    if isinstance(event, ToolCall) and self._commands.tools is None:
                        has_call_without_tools = True
            finally:
                self._screen.is_answering = False
                self._screen.pause()
        if has_call_without_tools:
            self._screen.log("the model called a tool, and there are none: start with --tools or --mcp")
        if summary is not None and summary.finish_reason in _FINISH_TEXTS:
            self._screen.log(f"the answer was {_FINISH_TEXTS[summary.finish_reason]}")

    @contextmanager
    def _ctrl_c_stops(self) -> Iterator[None]:
        """Make Ctrl-C stop the answer in this context; the third Ctrl-C ends the program."""
        handler_before = signal.getsignal(signal.SIGINT)
        num_presses = 0

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal num_presses
            num_presses += 1
            self._session.stop()
            if num_presses >= _QUIT_PRESSES and callable(handler_before):
                handler_before(number, frame)

        signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler_before)
