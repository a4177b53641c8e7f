"""The mlx-k2 command: the table of subcommands, and the conversion of errors to a message and an exit code."""

import difflib
import errno
import importlib
import io
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from types import FrameType, TracebackType
from typing import NoReturn

import click
from click.shell_completion import CompletionItem, shell_complete

from mlx_k2 import __version__
from mlx_k2.cli.profile import Profile, profile_path, read_profile
from mlx_k2.cli.streams import prepare_streams
from mlx_k2.cli.terminal_text import printable
from mlx_k2.errors import MlxK2Error

COMMANDS = {
    "chat": "Talk with the model in the terminal, with thinking and tools.",
    "generate": "Answer one prompt, streamed from the last stage as it is sampled.",
    "serve": "Serve the model to clients of OpenAI's and Anthropic's APIs.",
    "keys": "Make, list and remove the keys that clients of a server send.",
    "setup": "Install mlx-k2 on your Macs, and write a hostfile and a profile.",
    "doctor": "Check every host and every hop, and show what to fix.",
    "download": "Fetch each stage's files from the Hub on its own host.",
    "kernels": "Check and time the GPU kernels of this machine.",
    "bench": "Measure throughput over prompt lengths and streams.",
    "config": "Show your own defaults of options, and where each one is written.",
}
_HIDDEN_COMMANDS = ("stage",)
_MODULE_NAMES = {"config": "show_config"}
"""Modules of commands that do not have the command's name."""
_FOREIGN_COMMANDS = {
    "ask": "generate",
    "benchmark": "bench",
    "check": "doctor",
    "complete": "generate",
    "fetch": "download",
    "prompt": "generate",
    "pull": "download",
    "repl": "chat",
    "run": "chat",
    "server": "serve",
    "start": "serve",
    "talk": "chat",
}
"""This program's command for each name by which other programs call such a command."""
COMPLETION = "_MLX_K2_COMPLETE"
"""The environment variable with which a shell asks for completions, by click's convention."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SUBJECTS_BY_ERRNO = {errno.ENOENT: "the current folder", errno.ENOSPC: "standard output"}
"""The subjects of system errors that name no file."""


class Interrupted(BaseException):
    """The exception for a signal that ends this program. ``number`` is the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class PrintableRecord(logging.LogRecord):
    """A log record without control characters: records of libraries can quote a server."""

    def getMessage(self) -> str:  # noqa: N802 - the name that logging calls
        """Return the printable message."""
        return printable(super().getMessage())


class LazyGroup(click.Group):
    """A group that imports a command when it is called, so that --help is fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names that help shows."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import ``mlx_k2.cli.NAME`` and return its ``command``."""
        if cmd_name not in (*COMMANDS, *_HIDDEN_COMMANDS):
            return None
        module = _MODULE_NAMES.get(cmd_name, cmd_name)
        command: click.Command = importlib.import_module(f"mlx_k2.cli.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands and their summaries."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that ``args`` name. The error for an unknown one suggests a similar name."""
        name = args[0]  # with resilient_parsing, click completes a command line and raises no errors
        if name.startswith("-") or ctx.resilient_parsing or self.get_command(ctx, name) is not None:
            return super().resolve_command(ctx, args)
        is_sentence = " " in name or (len(args) > 1 and not any(word.startswith("-") for word in args))
        min_similarity = 0.8 if is_sentence else 0.6  # the first word of a prompt is seldom a mistyped command
        suggestions = difflib.get_close_matches(name.lower(), COMMANDS, 1, min_similarity)
        if name.lower() in _FOREIGN_COMMANDS:
            suggestions = [_FOREIGN_COMMANDS[name.lower()]]
        if suggestions:
            hint = f"did you mean {suggestions[0]}?"
        elif is_sentence:
            hint = f"to ask it, write mlx-k2 generate {shlex.quote(' '.join(args))}"
        else:
            hint = f"the commands are {', '.join(COMMANDS)}"
        raise click.UsageError(f"there is no command {name!r}: {hint}", ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the commands that begin with ``incomplete``; for a dash, the options. Imports no command."""
        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        return [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]


def user_profile() -> Profile:
    """Return the user's profile; errors are `read_profile`'s."""
    from mlx_k2.cli.options import SHARED_OPTIONS

    return read_profile(profile_path(), list(COMMANDS), SHARED_OPTIONS)


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"mlx-k2 {__version__} (mlx {version('mlx')})")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the versions of mlx-k2 and mlx.",
)
def cli() -> None:
    """Run Kimi K2 across two or more Apple-silicon Macs.

    \b
    Without a hostfile everything runs on this machine, with a small built-in model:
        mlx-k2 generate "Hello"

    \b
    With two Macs, this one and mac-2, which ssh reaches:
        mlx-k2 setup this mac-2 --model moonshotai/Kimi-K2-Thinking
        mlx-k2 download
        mlx-k2 chat
    """  # noqa: D301  # click reads the escape


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    # a signal that is ignored stays ignored: nohup ignores SIGHUP
    signals = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in signals:
        signal.signal(number, _interrupt)
    problem = prepare_streams()
    make_errors_printable()
    exit_code: int
    if instruction := os.environ.get(COMPLETION):
        exit_code = shell_complete(cli, {}, "mlx-k2", COMPLETION, instruction)
    elif problem is None:
        exit_code = run(sys.argv[1:])
    else:
        _print_error(f"error: {problem}")
        exit_code = 2
    for number in signals:
        signal.signal(number, signal.SIG_DFL)  # a further signal ends the process at once: all is cleaned up
    sys.exit(exit_code)


def make_errors_printable() -> None:
    """Make tracebacks of all threads and log records of libraries printable."""
    sys.excepthook = _print_traceback
    threading.excepthook = lambda error: _print_traceback(error.exc_type, error.exc_value, error.exc_traceback)
    sys.unraisablehook = lambda error: _print_traceback(error.exc_type, error.exc_value, error.exc_traceback)
    logging.setLogRecordFactory(PrintableRecord)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return the exit code. An error becomes a message on stderr, without a traceback."""
    try:
        # not cli.main, which hides a broken pipe
        with cli.make_context("mlx-k2", list(arguments), obj=user_profile) as context:
            cli.invoke(context)
    except MlxK2Error as error:
        _print_error(f"error: {error}")
        return error.exit_code
    except click.ClickException as error:
        message = io.StringIO()
        error.show(message)
        _print_error(message.getvalue().rstrip("\n"))
        return error.exit_code
    except Interrupted as interrupted:
        return 128 + interrupted.number
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python reports the error again when it flushes stdout
        return 128 + signal.SIGPIPE
    except OSError as error:  # for instance a cache folder that cannot be written, or a path that is too long
        subject = error.filename or _SUBJECTS_BY_ERRNO.get(error.errno or 0, "this machine")
        _print_error(f"error: {error.strerror or error}: {subject}")
        return 1
    except click.exceptions.Exit as exit_request:
        return exit_request.exit_code
    return 0


def _print_error(text: str) -> None:
    """Print an error as printable text, because it can quote files, hosts and the model."""
    click.echo(printable(text), err=True)


def _print_traceback(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    _print_error("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
