"""Tests of hints for misspelt commands and options, of the groups in help, and of shell completion."""

import os
import subprocess

import pytest

from mlx_k2.cli.main import run
from tests.cli.command import MLX_K2


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["genrate", "Hello"], "did you mean generate?"),
        (["chta"], "did you mean chat?"),
        (["pull"], "did you mean download?"),
        (["xyzzy"], "the commands are chat, generate, serve"),
        (["what", "is", "mlx?"], "to ask it, write mlx-k2 generate 'what is mlx?'"),
        (["What is mlx-k2?"], "to ask it, write mlx-k2 generate 'What is mlx-k2?'"),
        (["generate", "--modle", "x"], "Did you mean '--model'?"),
        (["generate", "--temprature", "0"], "Did you mean '--temperature'?"),
        (["generate", "--max_tokens", "3"], "Did you mean '--max-tokens'?"),
        (["chat", "--ctx-size", "3"], "Did you mean '--context'?"),
        (["serve", "--no-draft"], "Did you mean '--draft off'?"),
    ],
)
def test_an_unknown_name_is_answered_with_the_one_that_was_meant(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    reported = capsys.readouterr()
    assert reported.out == ""
    assert hint in reported.err.splitlines()[-1]


def test_an_option_of_another_program_is_suggested_only_where_it_has_an_equivalent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["doctor", "--max-new-tokens", "3"]) == 2
    assert "--max-tokens" not in capsys.readouterr().err


def test_help_lists_options_in_groups_with_the_commands_own_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--help"]) == 0
    shown = capsys.readouterr().out
    groups = [
        "Options:",
        "Hosts and model:",
        "Sampling and thinking:",
        "Form of the answer:",
        "Faults and logs:",
        "Tools:",
    ]
    assert [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")] == groups
    assert shown.index("Hosts and model:") < shown.index("-m, --model") < shown.index("Sampling and thinking:")
    assert shown.count("-m, --model") == 1


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["mlx-k2", "d"], ["plain,doctor", "plain,download"]),
        (["mlx-k2", "--ver"], ["plain,--version"]),
        (["mlx-k2", "generate", "--sta"], ["plain,--stages", "plain,--stall-timeout"]),
        (["mlx-k2", "generate", "--dtype", "b"], ["plain,bfloat16"]),
        (["mlx-k2", "generate", "--hostfile", "two"], ["file,two"]),
    ],
)
def test_a_shell_gets_completions(words: list[str], completed: list[str]) -> None:
    asked = {"_MLX_K2_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    ran = subprocess.run([MLX_K2], env={**os.environ, **asked}, capture_output=True, text=True, timeout=30)
    assert (ran.stdout.splitlines(), ran.stderr) == (completed, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_of_each_shell_is_printed(shell: str) -> None:
    environment = {**os.environ, "_MLX_K2_COMPLETE": f"{shell}_source"}
    ran = subprocess.run([MLX_K2], env=environment, capture_output=True, text=True, timeout=30)
    assert "_MLX_K2_COMPLETE" in ran.stdout
