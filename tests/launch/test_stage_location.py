"""Tests of the commands that start a stage, locally and over ssh."""

import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.launch.stage_location import StageLocation


def test_a_local_stage_runs_this_python_without_a_shell() -> None:
    assert StageLocation().start_commands() == ((sys.executable, "-P", "-m", "mlx_k2.stage"),)


def test_a_host_with_a_configured_python_uses_only_that() -> None:
    (command,) = StageLocation(ssh="mac-2", python="/opt/my python/bin/python3").start_commands()
    assert command[:2] == ("ssh", "-T")
    assert command[-3:] == ("--", "mac-2", "exec '/opt/my python/bin/python3' -P -m mlx_k2.stage")


def test_a_host_without_a_configured_python_tries_the_path_of_this_python_then_a_login_shell() -> None:
    first, second = StageLocation(ssh="mac-2").start_commands()
    assert first[-1] == f"exec {sys.executable} -P -m mlx_k2.stage"
    assert second[-1] == """exec "$SHELL" -lc 'exec mlx-k2 stage'"""


def test_ssh_options_disable_prompts_multiplexing_and_forwarding_and_set_timeouts() -> None:
    command = " ".join(StageLocation(ssh="mac-2").start_commands()[0])
    for option in (
        "BatchMode=yes",
        "ServerAliveInterval=2",
        "ServerAliveCountMax=3",
        "ControlMaster=no",
        "ControlPath=none",
        "ClearAllForwardings=yes",
        "ForwardAgent=no",
        "RemoteCommand=none",
        "PermitLocalCommand=no",
        "LogLevel=ERROR",
    ):
        assert f"-o {option} " in command
    assert "-o ConnectTimeout=" in command


@settings(deadline=None)  # each example starts a shell
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_any_python_path_is_quoted_as_one_shell_word(path: str) -> None:
    remote_command = StageLocation(ssh="mac-2", python="/" + path).start_commands()[0][-1]
    result = subprocess.run(["sh", "-c", remote_command.replace("exec ", "printf '%s\\n' ", 1)], capture_output=True)
    assert result.stdout.decode() == f"/{path}\n-P\n-m\nmlx_k2.stage\n"


def test_a_path_starting_with_tilde_becomes_relative_to_the_home_folder() -> None:
    (command,) = StageLocation(ssh="mac-2", python="~/venv/bin/python").start_commands()
    assert command[-1] == "exec ./venv/bin/python -P -m mlx_k2.stage"
