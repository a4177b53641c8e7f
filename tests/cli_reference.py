"""Generator of docs/cli.md from the commands' own --help: python -m tests.cli_reference > docs/cli.md."""

import sys
from typing import Any

import click

from mlx_k2.cli.main import cli

WIDTH = 100
HEADER = "# Commands\n\nMade from `--help` by `python -m tests.cli_reference`; a test compares the two.\n"


def reference() -> str:
    """Return the page: the program's help, then the help of each command that it lists."""
    width_settings: dict[str, Any] = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    program = click.Context(cli, info_name="mlx-k2", **cli.context_settings, **width_settings)
    parts = [HEADER, _section("mlx-k2", cli.get_help(program))]
    for name in cli.list_commands(program):
        command = cli.get_command(program, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=program, **width_settings)
        parts.append(_section(f"mlx-k2 {name}", command.get_help(context)))
    return "\n".join(parts)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```\n{text}\n```\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
