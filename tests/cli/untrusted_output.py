"""A program that shows texts on its terminal as the commands show texts of models, tools, hosts and files.

It reads lines from the file descriptor that its argument names. A line is a JSON object with a ``display``, a key of
DISPLAYS, and a text in ``parts``. After the output for each line it writes END.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable

from mlx_k2.chat.chat_events import CallEnded, CallStarted, Event
from mlx_k2.cli import main
from mlx_k2.cli.console import ConsoleListener, log
from mlx_k2.cli.doctor import _print_json, show_checks
from mlx_k2.cli.repl.screen import PlainScreen, RichScreen, Screen
from mlx_k2.cli.repl.wording import full_call
from mlx_k2.coordinator.handle import Restarting
from mlx_k2.deployment.restarting import Restart
from mlx_k2.doctor.checks import Check, CheckResult
from mlx_k2.text.reply_parts import Content, Reasoning
from mlx_k2.text.tool_call import ToolCall
from mlx_k2.tools.outcome import Outcome, ToolResult

END = "<END OF THIS TEXT>"


def tool_call(text: str) -> ToolCall:
    """Return a tool call without an error that has ``text`` in every other field."""
    return ToolCall(text, text, text, {text: [text]})


def restart(text: str) -> Restart:
    """Return the first of three restarts, for the reason ``text``."""
    return Restart(text, number=1, limit=3, wait_s=1.0)


def show_chat(screen: Screen, parts: list[str]) -> None:
    text = "".join(parts)
    events: list[Event] = [
        *(Reasoning(part) for part in parts),
        *(Content(part) for part in parts),
        CallStarted(tool_call(text)),
        CallEnded(tool_call(text), ToolResult(Outcome.DONE, text), seconds=1.0),
        Restarting(restart(text), text),
    ]
    for event in events:
        screen.show_event(event)
    screen.show_waiting(text)
    screen.log(text)
    screen.show_restart(restart(text))
    screen.pause()


def show_approval(parts: list[str]) -> None:
    for screen in (RichScreen(show_thinking=True), PlainScreen(show_thinking=True)):
        screen.show_call(f"the model wants to call {full_call(tool_call(''.join(parts)))}")


def show_progress(parts: list[str]) -> None:
    text = "".join(parts)
    with ConsoleListener(verbose=True) as listener:
        listener.log(text)
        listener.notify(text)
        listener.phase(text)
    with ConsoleListener(verbose=False) as listener:
        listener.phase(text)


def show_errors(parts: list[str]) -> None:
    text = "".join(parts)
    main._print_error(f"error: {text}")
    logging.getLogger("a library").warning("%s", text)
    log(text)
    main.run(["generate", "--" + text])  # prints an error that names the unknown option
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        sys.excepthook(RuntimeError, error, error.__traceback__)
    thread = threading.Thread(target=raise_error, args=[text], name=text)
    thread.start()
    thread.join()
    ErrorAtDeletion(text)


def raise_error(text: str) -> None:
    raise RuntimeError(text)


class ErrorAtDeletion:
    """An object whose deletion raises an error, which Python prints and ignores."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __del__(self) -> None:
        raise RuntimeError(self._text)


def show_doctor(parts: list[str]) -> None:
    text = "".join(parts)
    checks = (Check(text, CheckResult.FAILURE, text, text),)
    show_checks(checks)
    _print_json(checks)


DISPLAYS: dict[str, Callable[[list[str]], None]] = {
    "rich": lambda parts: show_chat(RichScreen(show_thinking=True), parts),
    "plain": lambda parts: show_chat(PlainScreen(show_thinking=True), parts),
    "approval": show_approval,
    "progress": show_progress,
    "errors": show_errors,
    "doctor": show_doctor,
}


def show_lines() -> None:
    main.make_errors_printable()
    with os.fdopen(int(sys.argv[1])) as lines:
        for line in lines:
            fields = json.loads(line)
            DISPLAYS[fields["display"]](fields["parts"])
            sys.stderr.flush()
            sys.stdout.write(END)
            sys.stdout.flush()


if __name__ == "__main__":
    show_lines()
