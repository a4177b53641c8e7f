"""Tests of `mlx-k2 setup` on this machine alone. tests/emulated_hosts/test_setup.py has those on several hosts."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.cli.main import run
from mlx_k2.cli.profile import with_value
from mlx_k2.launch.own_wheel import write_wheel
from mlx_k2.launch.remote_install import INSTALL_FOLDER, wheel_digest
from tests.advice import follows_advice
from tests.cli.command import MLX_K2, CommandLine
from tests.pty_command import on_pty
from tests.stand_in_ssh import write_ssh
from tests.test_advice_of_commands import REPO

LINES = st.lists(
    st.sampled_from(
        ["", "# a comment", 'model = "a"', 'hostfile = "b"', "seed = 1", "[chat]", 'hostfile = "c"', "  [serve]"]
    ),
    max_size=8,
)


@given(lines=LINES, value=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=10))
def test_a_value_of_the_profile_is_set_and_no_other_changes(lines: list[str], value: str) -> None:
    text = "\n".join(lines)
    try:
        fields = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return  # a key or a table occurs twice
    changed_text = with_value(text, "hostfile", value)
    assert tomllib.loads(changed_text) == fields | {"hostfile": value}
    assert with_value(changed_text, "hostfile", value) == changed_text


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder for the profile and the hostfile of a command in this process. It does not exist yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("MLX_K2_CONFIG")
    return tmp_path / "mlx-k2"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "nobody can be asked here: name the hosts as arguments, and give --yes"),
        (["this", "localhost"], "give each Mac once"),
        (["this"], "nobody can be asked here: give --yes to make all changes"),
        (["--", "-oProxyCommand=x"], "'-oProxyCommand=x' is not a host name that ssh accepts"),
        (["this", "--wheels", "/nowhere"], "--wheels /nowhere: the folder is missing, or has no .whl file"),
    ],
)
def test_a_setup_that_cannot_be_done_writes_nothing(
    arguments: list[str], error: str, settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["setup", *arguments]) == 2
    assert error in capsys.readouterr().err
    assert not settings.exists()


@follows_advice(
    "no host was named: name at least one, for instance: mlx-k2 setup this mac-2",
)
def test_an_empty_answer_asks_for_a_host_and_after_ctrl_c_the_next_text_is_on_a_line_of_its_own(
    tmp_path: Path,
) -> None:
    environment = CommandLine(tmp_path).environment(MLX_K2_CONFIG=str(tmp_path / "config.toml"))

    def start(**options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([MLX_K2, "setup"], env=environment, **options)

    with on_pty(start) as setup:
        setup.wait_for("(`this` is this Mac): ")
        setup.type("")
        setup.wait_for("no host was named: name at least one, for instance: mlx-k2 setup this mac-2")
        assert setup.end() == 2
    with on_pty(start) as setup:
        setup.wait_for("(`this` is this Mac): ")
        setup.type("this")
        setup.wait_for("? [y/N] ")
        setup.press(b"\x03")
        assert setup.end() == 130
        assert setup.shown.splitlines()[-1] == "nothing was changed"


@pytest.mark.slow
def test_setup_of_this_machine_keeps_other_values_and_runs_the_doctor(
    settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.mkdir()
    (settings / "config.toml").write_text("# mine\nseed = 3\n[chat]\nseed = 4\n")
    (settings / "hosts.json").write_text('[{"ssh": "127.0.0.1", "memory_gb": 8}]')
    assert run(["setup", "this", "--yes", "--model", "built-in"]) == 0
    profile = (settings / "config.toml").read_text()
    assert tomllib.loads(profile) == {
        "model": "built-in",
        "hostfile": str(settings / "hosts.json"),
        "seed": 3,
        "chat": {"seed": 4},
    }
    assert "# mine" in profile
    assert json.loads((settings / "hosts.json").read_text()) == [{"ssh": "127.0.0.1", "memory_gb": 8.0}]
    errors = capsys.readouterr().err
    assert "0 failure" in errors
    assert "next: mlx-k2 chat; " in errors, "the next step is not the chat, although the model needs no download"
    assert run(["setup", "this", "--yes"]) == 0
    assert "written" not in capsys.readouterr().err


@pytest.fixture
def mac_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `ssh mac-2` run commands on this machine, with another home folder in which mlx-k2 is installed."""
    home = tmp_path / "mac-2"
    python = home / INSTALL_FOLDER / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (home / INSTALL_FOLDER / "installed").write_text(wheel_digest(write_wheel(tmp_path)))
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{write_ssh(tmp_path / 'programs', home)}:{os.environ['PATH']}")


@follows_advice(
    "name the hosts as arguments, and give --yes to make all changes",
    "nobody can be asked here: give --yes to make all changes",
    "give each Mac once, for instance: mlx-k2 setup this mac-2",
    "the hosts share no network: give an address of each with --address",
    "1 addresses for 2 hosts: give --address once for each",
    "run the same command again to go on: what is done is not repeated",
    "the doctor found a failure: fix it, then run `mlx-k2 doctor`",
    "next: mlx-k2 chat; `mlx-k2 config` shows the profile",
)
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("mac_2")
def test_a_setup_that_follows_the_advice_of_its_refusals_succeeds(
    settings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = ("setup", "this", "mac-2", "--yes", "--python", sys.executable)

    def output_of(exit_code: int, *arguments: str) -> str:
        assert run(arguments) == exit_code, capsys.readouterr().err
        return "".join(capsys.readouterr())

    assert "nobody can be asked here: name the hosts as arguments, and give --yes to make all changes" in output_of(
        2, "setup"
    )
    assert "nobody can be asked here: give --yes to make all changes" in output_of(2, "setup", "this")
    assert "give each Mac once, for instance: mlx-k2 setup this mac-2" in output_of(2, "setup", "this", "this")
    # both hosts have a loopback interface only
    monkeypatch.setattr("mlx_k2.cli.setup.host_interfaces", lambda _request: [{"127.0.0.1": "lo0"}] * 2)
    assert "the hosts share no network: give an address of each with --address" in output_of(2, *setup)
    assert "1 addresses for 2 hosts: give --address once for each" in output_of(2, *setup, "--address", "127.0.0.1")

    unreachable = (*setup, "--address", "192.0.2.1", "--address", "192.0.2.2")  # addresses that no machine has
    first = output_of(1, *unreachable)  # writes the files, then the doctor fails
    assert "run the same command again to go on: what is done is not repeated" in first
    assert "written: " in first
    second = output_of(1, *unreachable)  # has nothing to write, and the doctor fails again
    assert "written: " not in second
    assert "the doctor found a failure: fix it, then run `mlx-k2 doctor`" in second
    hostfile = settings / "hosts.json"
    hostfile.write_text(re.sub(r"192\.0\.2\.\d", "127.0.0.1", hostfile.read_text()))
    assert "0 failure" in output_of(0, "doctor")

    last = output_of(0, *setup, "--address", "127.0.0.1", "--address", "127.0.0.1")
    assert "next: mlx-k2 chat; `mlx-k2 config` shows the profile" in last
    assert f'hostfile = "{hostfile}"' in output_of(0, "config")
    user = CommandLine(settings.parent)
    result = user.run("chat", "--max-tokens", "2", stdin="Hi\n")
    assert result.returncode == 0, result.stderr


def test_the_next_step_after_setup_of_a_hub_model_is_a_download(
    settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["setup", "this", "--yes", "--model", REPO]) == 0
    assert "next: mlx-k2 download; " in capsys.readouterr().err
    user = CommandLine(settings.parent)
    # offline, the error shows that download takes the model from the profile
    result = user.run("download", HF_HUB_OFFLINE="1")
    assert f"config.json of {REPO} at main is not in this host's cache" in result.stderr
