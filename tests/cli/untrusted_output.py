"""A program that shows texts on its terminal, in every way that the commands show what others wrote.

It reads one JSON object {"way": ..., "parts": [...]} a line from the file descriptor of its argument, and writes END
after each.
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


def call(text: str) -> ToolCall:
    return ToolCall(text, text, text, {text: [text]})


def chat(screen: Screen, parts: list[str]) -> None:
    text = "".join(parts)
    events: list[Event] = [
        *(Reasoning(part) for part in parts),
        *(Content(part) for part in parts),
        CallStarted(call(text)),
        CallEnded(call(text), ToolResult(Outcome.DONE, text), 1.0),
        Restarting(Restart(text, 1, 3, 1.0), text),
    ]
    for event in events:
        screen.show_event(event)
    screen.wait(text)
    screen.log(text)
    screen.show_restart(Restart(text, 1, 3, 1.0))
    screen.pause()


def approval(parts: list[str]) -> None:
    for screen in (RichScreen(show_thinking=True), PlainScreen(show_thinking=True)):
        screen.show_call(f"the model wants to call {full_call(call(''.join(parts)))}")


def listener(parts: list[str]) -> None:
    text = "".join(parts)
    with ConsoleListener(verbose=True) as shown:
        shown.log(text)
        shown.notify(text)
        shown.phase(text)
    with ConsoleListener(verbose=False) as shown:
        shown.phase(text)


def errors(parts: list[str]) -> None:
    text = "".join(parts)
    main._print_error(f"error: {text}")
    logging.getLogger("a library").warning("%s", text)
    log(text)
    main.run(["generate", "--" + text])
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        sys.excepthook(RuntimeError, error, error.__traceback__)
    thread = threading.Thread(target=fail, args=[text], name=text)
    thread.start()
    thread.join()
    FailsAtItsEnd(text)


def fail(text: str) -> None:
    raise RuntimeError(text)


class FailsAtItsEnd:
    """An object in whose end an error is raised, which Python reports and ignores."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __del__(self) -> None:
        raise RuntimeError(self._text)


def doctor(parts: list[str]) -> None:
    text = "".join(parts)
    checks = (Check(text, CheckResult.FAILURE, text, text),)
    show_checks(checks)
    _print_json(checks)


WAYS: dict[str, Callable[[list[str]], None]] = {
    "rich": lambda parts: chat(RichScreen(show_thinking=True), parts),
    "plain": lambda parts: chat(PlainScreen(show_thinking=True), parts),
    "approval": approval,
    "listener": listener,
    "errors": errors,
    "doctor": doctor,
}


def serve() -> None:
    main.make_errors_printable()
    with os.fdopen(int(sys.argv[1])) as lines:
        for line in lines:
            asked = json.loads(line)
            WAYS[asked["way"]](asked["parts"])
            sys.stderr.flush()
            sys.stdout.write(END)
            sys.stdout.flush()


if __name__ == "__main__":
    serve()
