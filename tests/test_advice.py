"""Tests of all advice in messages, read from the package's source.

Each row of the tables in ``test_advice_of_*.py`` is a message with advice, an input that is refused with it, and an
input that follows the advice and is accepted.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from mlx_k2.cli.main import cli
from tests.advice import all_advice, followed_messages
from tests.test_advice_of_commands import COMMAND_LINES
from tests.test_advice_of_requests import CHATS, COMPLETIONS, MESSAGES, RESPONSES
from tests.test_advice_of_values import HOSTFILES, VALUES

pytestmark = pytest.mark.timeout(60)

COMMAND_NAMES = r"bench|chat|config|doctor|download|generate|kernels|keys \w+|serve|setup|stage"
"""A pattern of names after `mlx-k2`. In prose other words follow it: "mlx-k2 needs ..."."""
Table = Sequence[tuple[str, Any, Any]]
TABLES: tuple[Table, ...] = (COMMAND_LINES, CHATS, COMPLETIONS, MESSAGES, RESPONSES, HOSTFILES, VALUES)


def test_each_option_and_command_of_mlx_k2_that_advice_names_exists() -> None:
    options = {"--auto-setup", "--over"}  # of mlx.distributed_config, which a test of test_advice_followed.py runs
    commands = dict(command_tree("", cli))
    for command in commands.values():
        for parameter in command.params:
            options |= {*parameter.opts, *parameter.secondary_opts}
    for _, message, _ in all_advice():
        assert set(re.findall(r"(?<![\w-])--[a-z][-a-z]+", message)) <= options, message
        named_commands = re.findall(rf"\bmlx-k2 ({COMMAND_NAMES})\b", message)
        assert set(named_commands) <= commands.keys(), message


def command_tree(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """Yield a command and its subcommands, each with its name below ``mlx-k2``, as in ``keys add``."""
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for subcommand_name in command.list_commands(context):
            subcommand = command.get_command(context, subcommand_name)
            assert subcommand is not None
            yield from command_tree(f"{name} {subcommand_name}".strip(), subcommand)


def test_all_advice_is_followed_in_a_test() -> None:
    """If this fails: follow each listed advice in a test, and name its message in ``follows_advice`` or in a table."""
    messages = [*followed_messages(Path(__file__).parent), *(message for table in TABLES for message, _, _ in table)]
    advice = list(all_advice())
    assert len(advice) > 150  # the search finds the advice of the whole package
    not_followed = [f"{file}: {text}" for file, text, pattern in advice if not any(map(pattern.search, messages))]
    assert not_followed == []
