"""Tests of the profile: defaults of options from a file and from variables, their sources, and the lines of errors."""

import re
from pathlib import Path

import pytest

from mlx_k2.cli import doctor, serve
from mlx_k2.cli.generate import command
from mlx_k2.cli.generate_options import GenerateOptions
from mlx_k2.cli.main import cli, run, user_profile
from tests.advice import follows_advice
from tests.cli.test_generate_options import options_in

PROFILE = """\
hostfile = "~/two-macs.json"
model = "moonshotai/Kimi-K2-Thinking"
temperature = 0.5
stop = ["END", "STOP"]

[generate]
temperature = 0.7
split = [32, 29]
verbose = true

[serve]
port = 9000
"""


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write PROFILE as the profile of the user kim and return its path."""
    path = tmp_path / "mlx-k2" / "config.toml"
    path.parent.mkdir()
    path.write_text(PROFILE)
    monkeypatch.delenv("MLX_K2_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/kim")
    return path


def options_of(*arguments: str) -> GenerateOptions:
    """Return the options of a command line of generate, with the profile's defaults."""
    parent = cli.make_context("mlx-k2", ["generate"], obj=user_profile)
    with command.make_context("generate", list(arguments), parent) as context:
        return options_in(context)


def test_the_command_line_comes_before_variables_the_commands_table_and_the_other_lines(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of()
    assert options.cluster.hostfile == "/home/kim/two-macs.json"
    assert options.cluster.model == "moonshotai/Kimi-K2-Thinking"
    assert (options.conversation.sampling.temperature, options.conversation.sampling.stop) == (0.7, ("END", "STOP"))
    assert (options.cluster.split, options.verbose) == ((32, 29), True)
    monkeypatch.setenv("MLX_K2_TEMPERATURE", "0.9")
    monkeypatch.setenv("MLX_K2_VERBOSE", "false")
    options = options_of()
    assert (options.conversation.sampling.temperature, options.verbose) == (0.9, False)
    assert options_of("--temp", "0").conversation.sampling.temperature == 0


def test_options_on_the_command_line_replace_defaults_that_contradict_them(profile: Path) -> None:
    local = options_of("--stages", "3", "-m", "built-in").cluster
    assert (local.num_stages, local.hostfile, local.split, local.model) == (3, None, None, None)
    other = options_of("--hostfile", "other.json").cluster
    assert (other.hostfile, other.split) == ("other.json", None)


def test_config_shows_each_value_with_the_line_or_the_variable_that_sets_it(
    profile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLX_K2_MODEL", "built-in")
    assert run(["config"]) == 0
    lines = set(capsys.readouterr().out.splitlines())
    assert lines == {
        f'hostfile = "/home/kim/two-macs.json"  # {profile}, line 1',
        'model = "built-in"  # MLX_K2_MODEL',
        f"temperature = 0.5  # {profile}, line 3",
        f'stop = ["END", "STOP"]  # {profile}, line 4',
        f"generate.temperature = 0.7  # {profile}, line 7",
        f'generate.split = "32,29"  # {profile}, line 8',
        f"generate.verbose = true  # {profile}, line 9",
        f"serve.port = 9000  # {profile}, line 12",
    }
    assert run(["config", "doctor"]) == 0
    doctor_lines = capsys.readouterr().out.splitlines()
    assert f'hostfile = "/home/kim/two-macs.json"  # {profile}, line 1' in doctor_lines
    assert "deep = false  # default" in doctor_lines
    assert not any(line.startswith("temperature") for line in doctor_lines)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (
            "model = 'a'\nhostfil = 'x'",
            "line 2: 'hostfil' is not an option of several commands: did you mean hostfile?",
        ),
        ("[chatt]\nseed = 3", "line 1: there is no command 'chatt': did you mean chat?"),
        (
            "[generate]\n\nmax_tokens = 3",
            "line 3: mlx-k2 generate has no option 'max_tokens': did you mean max-tokens?",
        ),
        ("[generate]\nmax-tokens = 'many'", "line 2: max-tokens: 'many' is not a valid integer"),
        ("dtype = 'int8'", "line 1: dtype: 'int8' is not one of"),
        ("[generate]\nseed = {a = 3}", "line 2: seed is a table: give one value"),
        (
            "[generate]\ntemperature = -1",
            "temperature -1.0 is out of range: give .* [(]temperature is from .*, line 2[)]",
        ),
        (
            "[generate]\nlogprobs = 3",
            "--logprobs shows in the JSON lines only: add --json .logprobs is from .*, line 2",
        ),
        ("model = ", "config.toml cannot be read: Invalid value .at end of document"),
    ],
)
def test_an_error_in_the_profile_is_named_by_file_and_line_and_does_not_prevent_help(
    content: str, error: str, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile.write_text(content)
    assert run(["generate", "Hello"]) == 2
    errors = capsys.readouterr().err
    assert re.search(error, errors.splitlines()[-1]), errors
    assert str(profile) in errors
    assert run(["generate", "--help"]) == 0


def test_an_error_about_a_value_of_the_command_line_does_not_name_the_profile(
    profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile.write_text("[generate]\nmax-tokens = 3")
    assert run(["generate", "Hello", "--max-tokens", "many"]) == 2
    errors = capsys.readouterr().err
    assert "Invalid value for '--max-tokens' / '-n': 'many'" in errors
    assert str(profile) not in errors


@follows_advice(
    "config.toml, line 1: stop is a table: give one value, or a list",
)
@pytest.mark.parametrize("value", ['"END"', '["END"]'])
def test_an_option_is_one_value_or_a_list(profile: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    profile.write_text("[generate]\nstop = {a = 3}")
    assert run(["config", "generate"]) == 2
    assert "stop is a table: give one value, or a list" in capsys.readouterr().err
    profile.write_text(f"[generate]\nstop = {value}")
    assert options_of().conversation.sampling.stop == ("END",)


def test_each_table_of_the_profile_applies_to_its_command(profile: Path) -> None:
    parent = cli.make_context("mlx-k2", ["serve"], obj=user_profile)
    params = serve.command.make_context("serve", [], parent).params
    assert (params["port"], params["model"]) == (9000, "moonshotai/Kimi-K2-Thinking")
    assert "temperature" not in doctor.command.make_context("doctor", [], parent).params
