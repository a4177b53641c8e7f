"""Approval of tool calls by the user. Knows no tools."""

from collections.abc import Collection

from mlx_k2.chat.chat_session import ChatSession
from mlx_k2.cli.repl.keyboard import LineKeyboard
from mlx_k2.cli.repl.screen import Screen
from mlx_k2.cli.repl.wording import full_call
from mlx_k2.text.tool_call import ToolCall

_QUESTION = "run it? [y]es, [n]o, [a]lways this tool: "


class ToolApproval:
    """Approval by a question before each call, unless its tool is allowed. ``allows_all`` allows all tools."""

    def __init__(self, screen: Screen, keyboard: LineKeyboard, allowed: Collection[str], *, allows_all: bool) -> None:
        self._screen = screen
        self._keyboard = keyboard
        self._allows_all = allows_all
        self._has_logged_refusal = False
        self.allowed = set(allowed)
        self.session: ChatSession | None = None
        """The session whose answer is stopped by Ctrl-C or the end of the input at a question."""

    def allows(self, name: str) -> bool:
        """Return whether calls of this tool need no question."""
        return self._allows_all or name in self.allowed

    def __call__(self, call: ToolCall) -> bool:
        """Return whether this call may run. Ask the user unless its tool is allowed; False if nobody can be asked."""
        if self.allows(call.name):
            return True
        if not self._keyboard.can_ask:
            if not self._has_logged_refusal:
                self._has_logged_refusal = True
                self._screen.log("nobody can be asked here: allow tools with --yes or --allow-tool NAME")
            return False
        self._screen.show_call(f"the model wants to call {full_call(call)}")
        return self._ask(call.name)

    def _ask(self, name: str) -> bool:
        """Repeat the question until it is answered; return whether the call may run."""
        while True:
            try:
                answer = self._keyboard.ask(_QUESTION).strip().lower()
            except (EOFError, KeyboardInterrupt):
                if self.session is not None:
                    self.session.stop()
                return False
            if answer in ("a", "always"):
                self.allowed.add(name)
            if answer in ("y", "yes", "a", "always"):
                return True
            if answer in ("n", "no"):
                return False
