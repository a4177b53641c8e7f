"""Tests of all advice in messages, read from the package's source.

The tables of the files ``test_advice_of_*`` hold what is refused, the message, and what is accepted afterwards.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from mlx_k2.cli.main import cli
from tests.advice import advice, followed
from tests.test_advice_of_commands import OPTIONS
from tests.test_advice_of_requests import CHATS, COMPLETIONS, MESSAGES, RESPONSES
from tests.test_advice_of_values import HOSTFILES, VALUES

pytestmark = pytest.mark.timeout(60)


def test_each_option_and_command_of_mlx_k2_that_advice_names_exists() -> None:
    options = {"--auto-setup", "--over"}  # of mlx.distributed_config, which a test of test_advice_followed.py runs
    names = set()
    to_visit: list[tuple[str, click.Command]] = [("", cli)]
    for name, command in to_visit:
        names.add(name)
        options |= {found for parameter in command.params for found in (*parameter.opts, *parameter.secondary_opts)}
        if isinstance(command, click.Group):
            context = click.Context(command)
            found = {inner: command.get_command(context, inner) for inner in command.list_commands(context)}
            to_visit += [(f"{name} {inner}".strip(), one) for inner, one in found.items() if one is not None]
    for text, _ in advice():
        _, _, message = text.partition(": ")
        assert set(re.findall(r"(?<![\w-])--[a-z][-a-z]+", message)) <= options, message
        assert set(re.findall(r"\bmlx-k2 (download|doctor|kernels|bench|keys \w+)\b", message)) <= names, message


def test_all_advice_is_followed_in_a_test() -> None:
    """For advice that this fails for: follow it in a test, and name its message in ``follows_advice`` or in a table."""
    tables: Sequence[Sequence[tuple[Any, ...]]] = (OPTIONS, CHATS, COMPLETIONS, MESSAGES, RESPONSES, HOSTFILES, VALUES)
    messages = [*followed(Path(__file__).parent), *(case[0] for table in tables for case in table)]
    all_advice = list(advice())
    assert len(all_advice) > 150
    missing = [text for text, pattern in all_advice if not any(map(pattern.search, messages))]
    assert missing == []
