"""Tests of is_command, which decides whether a line of the chat is a command or a message."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.cli.repl.commands import HELP, OTHER_NAMES, is_command

WORDS = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)


@pytest.mark.parametrize("name", HELP)
@pytest.mark.parametrize("rest", ["", " /etc/hosts", " a/b", "\n"])
def test_a_line_that_begins_with_a_commands_name_is_a_command(name: str, rest: str) -> None:
    assert is_command(name + rest)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_command_of_another_chat_program_is_a_command_unless_a_space_precedes_it(name: str) -> None:
    assert is_command(name)
    assert is_command(f"{name} x") == name.startswith("/")  # a word such as quit begins a message
    assert not is_command(f" {name}")


def test_a_line_that_begins_with_an_existing_path_is_a_message() -> None:
    assert not is_command("/tmp is full, what can I delete?")
    assert is_command("/nowhere_here is full")
    assert is_command("/")


@given(words=st.lists(WORDS, min_size=2, max_size=4), rest=st.text(max_size=10))
def test_a_line_that_begins_with_a_path_of_several_parts_is_a_message(words: list[str], rest: str) -> None:
    assert not is_command(f"/{'/'.join(words)} {rest}")
    assert not is_command(f"/{'/'.join(words)}: {rest}")


@given(word=WORDS)
def test_a_slash_and_a_word_that_is_no_path_are_a_command_that_may_not_exist(word: str) -> None:
    assert is_command(f"/{word} a/b") != Path(f"/{word}").exists()
    assert not is_command(f" /{word}")
