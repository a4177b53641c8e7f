"""Generator of docs/cli.md from the commands' own --help: python -m tests.cli_reference > docs/cli.md."""

import sys
from collections.abc import Iterator
from typing import Any

import click

from mlx_k2.cli.main import cli

WIDTH = 100
HEADER = "# Commands\n\nMade from `--help` by `python -m tests.cli_reference`; a test compares the two.\n"


def reference() -> str:
    """Return the page: the program's help, then the help of each command and subcommand that it lists."""
    width_settings: dict[str, Any] = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    program = click.Context(cli, info_name="mlx-k2", **cli.context_settings, **width_settings)
    return "\n".join([HEADER, *_sections(cli, program, width_settings)])


def _sections(command: click.Command, context: click.Context, settings: dict[str, Any]) -> Iterator[str]:
    """Yield the sections of a command and of its subcommands. ``settings`` are options of click.Context."""
    yield f"## {context.command_path}\n\n```\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            assert subcommand is not None
            yield from _sections(
                subcommand, click.Context(subcommand, info_name=name, parent=context, **settings), settings
            )


if __name__ == "__main__":
    sys.stdout.write(reference())
