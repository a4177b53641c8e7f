"""The commands of a chat: lines that begin with a slash. Knows no keyboard and starts nothing."""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_k2.chat.chat_events import Event
from mlx_k2.chat.chat_session import ChatSession
from mlx_k2.chat.tool_round import Tools
from mlx_k2.cli.repl.saved_chat import SavedChat, load_chat, save_chat
from mlx_k2.cli.repl.screen import Screen
from mlx_k2.cli.repl.tool_approval import ToolApproval
from mlx_k2.cli.repl.usage_totals import UsageTotals
from mlx_k2.cli.repl.wording import one_line
from mlx_k2.errors import MlxK2Error, RequestError

_MAX_CHARS = 100
"""Length at which a quoted text is cut."""

HELP = {
    "/help": ("", "show this list; also /?"),
    "/system": ("[TEXT | off]", "show or set the system prompt; off: the default"),
    "/reset": ("", "delete all messages; also /clear"),
    "/undo": ("", "remove your last message and what followed"),
    "/retry": ("", "answer your last message again"),
    "/save": ("FILE", "write the conversation to a file"),
    "/load": ("FILE", "continue a conversation from a file"),
    "/think": ("show | hide | on | off", "show or hide thinking, or switch it on or off"),
    "/tools": ("", "show the tools that the model may call"),
    "/stats": ("", "show counts of tokens, and each stage's work"),
    "/quit": ("", "end the chat; also /exit, /bye, quit and Ctrl-D"),
}
"""The argument and the effect of each command."""
OTHER_NAMES = {"/?": "/help", "/clear": "/reset", "/exit": "/quit", "/bye": "/quit", "quit": "/quit", "exit": "/quit"}
"""Other names of commands. Those without a slash are commands only if they are the complete line."""
_KEYS = (
    "Enter sends. Alt-Enter, Ctrl-J or a backslash at the end begins a new line.",
    "Ctrl-C stops an answer. Write a space before a message that begins with a slash.",
)
"""Lines on the keyboard, which /help shows after the commands."""


def is_command(line: str) -> bool:
    """Return whether a line is a command. A line that begins with a path is a message, unless it is also a command.

    A path has a second slash or exists.
    """
    if not line.startswith("/"):
        return line.strip() in OTHER_NAMES and not line.startswith(" ")
    first_word = line.split(maxsplit=1)[0]
    is_path = "/" in first_word[1:] or (first_word != "/" and Path(first_word).exists())
    return first_word in HELP or first_word in OTHER_NAMES or not is_path


class Quit(Exception):
    """The exception that ends the chat at the user's command."""


@dataclass
class Commands:
    """The commands on one session with one model.

    ``show_stats`` shows each stage's fraction of the computing time. ``temperature`` returns the temperature of
    replies with thinking (True) and without it (False).
    """

    session: ChatSession
    model_name: str
    model_digest: str
    screen: Screen
    usage: UsageTotals
    tools: Tools | None
    approval: ToolApproval
    show_stats: Callable[[], None]
    temperature: Callable[[bool], float]

    def run(self, line: str) -> Iterator[Event]:
        """Run one command; yield the events of an answer that it starts.

        Raises:
            RequestError: the command does not exist or cannot be run.
            Quit: the command is /quit.
        """
        name, _, argument = line.partition(" ")
        name = OTHER_NAMES.get(name, name)
        if name not in HELP:
            known_words = [known_name.lstrip("/") for known_name in (*HELP, *OTHER_NAMES)]
            similar_words = difflib.get_close_matches(name[1:], known_words, 1)
            suggestion = f"did you mean /{similar_words[0]}? " if similar_words else ""
            raise RequestError(
                f"there is no command {one_line(name, _MAX_CHARS)}: {suggestion}/help lists them; "
                "to send it as a message, write a space before it"
            )
        argument = argument.strip()
        if argument and not HELP[name][0]:
            raise RequestError(f"{name} takes no argument")
        events: Iterator[Event] | None = getattr(self, f"_{name[1:]}")(argument)  # the method _help for /help
        if events is not None:
            yield from events

    def save_to(self, path: Path) -> None:
        """Write the conversation to a file.

        Raises:
            RequestError: the file cannot be written.
        """
        messages = [message.json_value() for message in self.session.conversation.messages]
        save_chat(path, SavedChat(self.model_name, self.model_digest, messages))

    def _help(self, argument: str) -> None:
        width = max(len(f"{name} {hint}") for name, (hint, _) in HELP.items())
        for name, (hint, text) in HELP.items():
            self.screen.log(f"{f'{name} {hint}':{width}}  {text}")
        for line in _KEYS:
            self.screen.log(line)

    def _system(self, argument: str) -> None:
        if argument:
            self.session.cancel_prefill().set_system(None if argument == "off" else argument)
            self._recount()
        system = self.session.cancel_prefill().system
        self.screen.log("the system prompt is the model's own" if system is None else f"the system prompt: {system}")

    def _reset(self, argument: str) -> None:
        self.session.cancel_prefill().reset()
        self._recount()
        self.screen.log("a new conversation")

    def _undo(self, argument: str) -> None:
        text = self.session.cancel_prefill().undo()
        if text is None:
            raise RequestError("there is no message to remove")
        self._recount()
        self.screen.log(f"removed: {one_line(text, _MAX_CHARS)}")

    def _retry(self, argument: str) -> Iterator[Event]:
        return self.session.retry()

    def _save(self, argument: str) -> None:
        path = _path(argument, "/save")
        self.save_to(path)
        self.screen.log(f"the conversation is in {path}")

    def _load(self, argument: str) -> None:
        path = _path(argument, "/load")
        messages = load_chat(path, self.model_digest)
        try:
            warnings = self.session.load(messages)
        except MlxK2Error as error:
            raise RequestError(f"{path}: {error}") from None
        self._recount()
        for line in warnings:
            self.screen.log(line)
        self.screen.log(f"{len(messages)} messages from {path}")

    def _think(self, argument: str) -> None:
        match argument:
            case "show" | "hide":
                self.screen.show_thinking = argument == "show"
                self.screen.log("thinking is shown" if self.screen.show_thinking else "thinking is hidden")
            case "on" | "off":
                temperature = self.temperature(argument == "on")
                self.session.set_thinking(thinking=argument == "on", temperature=temperature)
                self._recount()
                self.screen.log(f"thinking is {argument}; the temperature is {temperature:g}")
            case _:
                raise RequestError("give /think show, hide, on or off")

    def _tools(self, argument: str) -> None:
        declarations = [] if self.tools is None else self.tools.declarations
        for declaration in declarations:
            function = declaration["function"]
            mark = "" if self.approval.allows(function["name"]) else "  [asks first]"
            self.screen.log(f"{function['name']}{mark}  {one_line(function['description'], _MAX_CHARS)}".rstrip())
        if not declarations:
            self.screen.log("there are no tools: start with --tools or --mcp")

    def _stats(self, argument: str) -> None:
        self.screen.log(self.usage.totals_line())
        self.screen.log(self.usage.status_line())
        self.show_stats()

    def _quit(self, argument: str) -> None:
        raise Quit

    def _recount(self) -> None:
        """Count the context tokens again after a change of the conversation."""
        self.usage.context_used = len(self.session.cancel_prefill().next_prompt_prefix())


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise RequestError(f"give a file: {command} FILE")
    return Path(argument).expanduser()
