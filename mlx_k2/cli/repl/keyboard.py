"""Input of the user's lines: a terminal with editing, or plain lines. Knows neither commands nor a model."""

import contextlib
import sys
import termios
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from prompt_toolkit import Application, PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input.typeahead import clear_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.patch_stdout import patch_stdout
from prompt_toolkit.styles import Style

from mlx_k2.cli.repl.wording import one_line
from mlx_k2.cli.streams import is_dumb, is_terminal, refuses_colour
from mlx_k2.errors import RequestError
from mlx_k2.private_files import state_folder
from mlx_k2.text.tokenizer import well_formed

PROMPT = "> "
_MENU_LINES = 8
_MAX_QUOTED_CHARS = 100
_STYLE = Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"})


class LineKeyboard:
    """Lines of standard input. A line that ends with a backslash continues in the next line."""

    @property
    def can_ask(self) -> bool:
        """Whether standard input is a terminal, so that a user can answer a question."""
        return is_terminal(sys.stdin)

    def read(self) -> str:
        """Return the next message or command.

        Raises:
            EOFError: the input has ended.
            KeyboardInterrupt: the user discards the current line.
            RequestError: the line has a byte that is not text.
        """
        lines = [self._read_line(PROMPT)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read_line(". "))
        text = "\n".join(lines)
        if well_formed(text) != text:
            encoding, quoted = sys.stdin.encoding.upper(), one_line(text, _MAX_QUOTED_CHARS)
            raise RequestError(f"this line is not {encoding} text, and is not sent: {quoted}")
        return text

    def ask(self, question: str) -> str:
        """Discard what was typed before, and return the answer to a question; raise the errors of ``read``."""
        if is_terminal(sys.stdin):
            termios.tcflush(sys.stdin, termios.TCIFLUSH)
        return self._read_line(question)

    def _read_line(self, prompt: str) -> str:
        if is_terminal(sys.stdin):
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


class TerminalKeyboard(LineKeyboard):
    """A terminal with editing, a history in the file ``history``, and a status line with the text of ``status``.

    Without a file the history ends with the program.
    """

    def __init__(
        self, history: Path | None, commands: Sequence[str], status: Callable[[], str], *, colours: bool
    ) -> None:
        self._message_session: PromptSession[str] = PromptSession(
            history=InMemoryHistory() if history is None else _History(str(history)),
            completer=_CommandCompleter(commands),
            complete_while_typing=True,
            bottom_toolbar=status,
            key_bindings=_bindings(),
            multiline=True,
            prompt_continuation=". ",
            color_depth=None if colours else ColorDepth.DEPTH_1_BIT,
            style=_STYLE,
        )
        self._message_session.app.before_render += self._fit_menu
        self._question_session: PromptSession[str] = PromptSession(history=InMemoryHistory(), reserve_space_for_menu=0)

    def read(self) -> str:
        """Return the next message or command; output of other threads meanwhile appears above the prompt."""
        with patch_stdout(raw=True):
            return self._message_session.prompt(PROMPT)

    def ask(self, question: str) -> str:
        """Return the answer to a question, as ``LineKeyboard.ask`` does."""
        termios.tcflush(sys.stdin, termios.TCIFLUSH)
        clear_typeahead(self._question_session.input)  # keys after the last Enter that prompt_toolkit has read already
        return self._question_session.prompt(question)

    def _fit_menu(self, app: Application[str]) -> None:
        """Reserve lines for the menu of completions: as many as the terminal has beside the status line."""
        free_lines = app.output.get_size().rows - 1
        self._message_session.reserve_space_for_menu = min(_MENU_LINES, free_lines)


def _can_edit() -> bool:
    """Return whether stdin and stdout are a terminal on which lines can be edited."""
    return is_terminal(sys.stdin) and is_terminal(sys.stdout) and not is_dumb()


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """Keep keys that are typed while the model loads or answers for the next prompt, and do not echo them.

    Turns off the terminal's echo and line mode in this context; does nothing where lines cannot be edited.
    """
    if not _can_edit():
        yield
        return
    terminal = sys.stdin.fileno()
    attributes_before = termios.tcgetattr(terminal)
    input_flags, output_flags, control_flags, local_flags, *rest = attributes_before
    input_flags &= ~termios.ICRNL  # keep Enter as CR, so that it is not read as Ctrl-J later
    local_flags &= ~(termios.ECHO | termios.ICANON)
    attributes = [input_flags, output_flags, control_flags, local_flags, *rest]
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)
    when = termios.TCSAFLUSH  # after an error discard the input: the shell would run a message as a command
    try:
        yield
        when = termios.TCSANOW
    finally:
        with contextlib.suppress(termios.error):  # the terminal is closed
            termios.tcsetattr(terminal, when, attributes_before)


def choose_keyboard(commands: Sequence[str], status: Callable[[], str]) -> LineKeyboard:
    """Return a keyboard with editing and saved history; plain lines if stdin or stdout is no terminal or a dumb one."""
    if not _can_edit():
        return LineKeyboard()
    folder = state_folder()
    history = None if folder is None else _usable_history(folder / "chat-history")
    return TerminalKeyboard(history, commands, status, colours=not refuses_colour())


def _usable_history(path: Path) -> Path | None:
    """Return ``path`` if a history can be written there, else None."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("ab"):
            return path
    return None


class _History(FileHistory):
    """A history file whose text is made well-formed, because a terminal can send bytes that are not UTF-8."""

    def store_string(self, string: str) -> None:
        """Append a message to the file."""
        super().store_string(well_formed(string))


def _bindings() -> KeyBindings:
    """Return the key bindings: Enter sends; Enter after a backslash, Escape Enter and Ctrl-J begin a new line."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("c-j")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class _CommandCompleter(Completer):
    """A completer for command names at the start of a message, and for files after /save and /load."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yield the completions of the text before the cursor."""
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        name, space, argument = text.partition(" ")
        if not space:
            yield from (Completion(command, -len(name)) for command in self._commands if command.startswith(name))
        elif name in ("/save", "/load"):
            yield from self._paths.get_completions(Document(argument), complete_event)
