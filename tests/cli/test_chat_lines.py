"""Tests of what a line of the chat is: a command, or a message."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.cli.repl.commands import HELP, is_command

WORD = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)


@pytest.mark.parametrize("name", HELP)
@pytest.mark.parametrize("rest", ["", " /etc/hosts", " a/b", "\n"])
def test_a_line_that_begins_with_a_commands_name_is_a_command(name: str, rest: str) -> None:
    assert is_command(name + rest)


@given(words=st.lists(WORD, min_size=2, max_size=4), rest=st.text(max_size=10))
def test_a_line_that_begins_with_a_path_is_a_message(words: list[str], rest: str) -> None:
    assert not is_command(f"/{'/'.join(words)} {rest}")
    assert not is_command(f"/{'/'.join(words)}: {rest}")


@given(word=WORD)
def test_a_word_after_one_slash_is_a_command_that_may_not_exist(word: str) -> None:
    assert is_command(f"/{word} a/b")
    assert not is_command(f" /{word}")
