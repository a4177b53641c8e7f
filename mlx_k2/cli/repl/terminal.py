"""Choice of the screen and the keyboard for a terminal. Knows no session."""

import os
import sys
from collections.abc import Callable, Sequence

from mlx_k2.cli.repl.keyboard import Keyboard, LineKeyboard, TerminalKeyboard, usable_history
from mlx_k2.cli.repl.screen import PlainScreen, RichScreen, Screen
from mlx_k2.cli.streams import is_terminal
from mlx_k2.private_files import state_folder


def choose_screen(*, show_thinking: bool) -> Screen:
    """Return a plain screen if stdout is not a terminal, or a dumb one, or with NO_COLOR; else one with colours."""
    plain = not is_terminal(sys.stdout) or _no_colour() or _is_dumb()
    return (PlainScreen if plain else RichScreen)(show_thinking=show_thinking)


def choose_keyboard(commands: Sequence[str], status: Callable[[], str]) -> Keyboard:
    """Return a keyboard with editing and saved history if stdin and stdout are capable terminals, else plain lines."""
    if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)) or _is_dumb():
        return LineKeyboard()
    state = state_folder()
    history = None if state is None else usable_history(state / "chat-history")
    return TerminalKeyboard(history, commands, status, colours=not _no_colour())


def _no_colour() -> bool:
    return bool(os.environ.get("NO_COLOR"))


def _is_dumb() -> bool:
    return os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")
