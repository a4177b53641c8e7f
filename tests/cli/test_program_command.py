"""Tests of hints for misspelt commands and options, of the groups of options in help, and of shell completion."""

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
def test_the_error_for_an_unknown_name_has_a_hint_to_an_existing_one(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert hint in output.err.splitlines()[-1]


def test_no_option_is_suggested_that_the_command_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    # Other programs call --max-tokens of generate so, and doctor has no such option.
    assert run(["doctor", "--max-new-tokens", "3"]) == 2
    assert "--max-tokens" not in capsys.readouterr().err


def test_help_lists_options_in_groups_with_the_commands_own_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "Options:",
        "Hosts and model:",
        "Sampling and thinking:",
        "Form of the answer:",
        "Faults and logs:",
        "Tools:",
    ]
    assert text.index("Hosts and model:") < text.index("-m, --model") < text.index("Sampling and thinking:")
    assert text.count("-m, --model") == 1


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        (["mlx-k2", "d"], ["plain,doctor", "plain,download"]),
        (["mlx-k2", "--ver"], ["plain,--version"]),
        (["mlx-k2", "generate", "--sta"], ["plain,--stages", "plain,--stall-timeout"]),
        (["mlx-k2", "generate", "--dtype", "b"], ["plain,bfloat16"]),
        (["mlx-k2", "generate", "--hostfile", "two"], ["file,two"]),
    ],
)
def test_a_shell_gets_completions(words: list[str], completions: list[str]) -> None:
    variables = {"_MLX_K2_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    result = subprocess.run([MLX_K2], env={**os.environ, **variables}, capture_output=True, text=True, timeout=30)
    assert (result.stdout.splitlines(), result.stderr) == (completions, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_of_each_shell_is_printed(shell: str) -> None:
    environment = {**os.environ, "_MLX_K2_COMPLETE": f"{shell}_source"}
    result = subprocess.run([MLX_K2], env=environment, capture_output=True, text=True, timeout=30)
    assert "_MLX_K2_COMPLETE" in result.stdout
