"""Tests of surveys of a host's Pythons and of installing on it. tests/emulated_hosts/test_setup.py uses real ssh."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_k2.errors import SetupError
from mlx_k2.launch.own_wheel import write_wheel
from mlx_k2.launch.remote_install import INSTALL_FOLDER, HostSurvey, install, survey
from tests.advice import follows_advice
from tests.stand_in_ssh import write_ssh
from tests.stub_wheels import write_stub_wheels


def survey_with(*pythons: tuple[tuple[int, ...], str], python: str | None = None) -> HostSurvey:
    """Return a survey that found ``pythons``, as versions with paths; ``python`` is the one that can be used."""
    return HostSurvey(
        host="mac-2",
        home="/Users/kim",
        system="macOS 26.3",
        memory_bytes=512 * 10**9,
        pythons=pythons,
        python=python,
        installed_digest="",
    )


@pytest.mark.parametrize(
    ("pythons", "problem"),
    [
        ((), "no Python was found: install Python 3.11 or newer there, or name one with --python"),
        (
            (((3, 9, 6), "/usr/bin/python3"),),
            "its newest Python is 3.9.6 (/usr/bin/python3, which comes with macOS) and mlx-k2 needs 3.11",
        ),
        ((((3, 10, 1), "/opt/homebrew/bin/python3.10"), ((3, 9, 6), "/usr/bin/python3")), "is 3.10.1 (/opt/homebrew/"),
        ((((3, 12, 3), "/usr/bin/python3.12"),), "cannot make environments: install its venv package (python3-venv)"),
    ],
)
def test_the_problem_of_a_host_without_a_usable_python_names_what_to_install(
    pythons: tuple[tuple[tuple[int, ...], str], ...], problem: str
) -> None:
    assert problem in str(survey_with(*pythons).problem)


def test_a_host_with_a_usable_python_has_no_problem_and_an_environment_in_its_home() -> None:
    python = "/opt/homebrew/bin/python3.13"
    usable = survey_with(((3, 13, 1), python), python=python)
    assert usable.problem is None
    assert usable.environment_python == "/Users/kim/.local/share/mlx-k2/env/bin/python"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the home folder of mac-2, which ssh reaches and which is this machine."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{write_ssh(tmp_path / 'programs', folder)}:{os.environ['PATH']}")
    return folder


def write_python(path: Path, report: str) -> str:
    """Write a program that answers a survey as a Python does, with ``report`` and its path; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{report} {path}'\n")
    path.chmod(0o755)
    return str(path)


@follows_advice(
    "no Python was found: install Python 3.11 or newer there, or name one with --python",
    "its newest Python is 3.9.6 (a) and mlx-k2 needs 3.11: install a newer one there, for instance with "
    "`brew install python@3.13`, or name one with --python",
    "its Python 3.12.3 (a) cannot make environments: install its venv package (python3-venv)",
    "its /no/python is no Python that runs there: leave --python out, or name another",
)
def test_a_host_that_follows_the_advice_of_a_survey_can_be_used(home: Path) -> None:
    missing_python, old_python = home / "python", write_python(home / "python3.9", "3.9.6 pip")
    with pytest.raises(SetupError, match=f"its {missing_python} is no Python that runs there: leave --python out, or"):
        survey("mac-2", str(missing_python))
    assert "or name one with --python" in str(survey("mac-2", old_python).problem)
    assert "or name one with --python" in str(survey_with().problem)
    assert survey("mac-2", sys.executable).python == sys.executable

    python_without_venv = write_python(home / "python3.12", "3.12.3 -")
    assert "install its venv package (python3-venv)" in str(survey("mac-2", python_without_venv).problem)
    assert survey("mac-2", write_python(home / "python3.12", "3.12.3 pip")).problem is None

    # a survey finds a newly installed Python in ~/.local/bin, as in Homebrew's folder
    new_python = write_python(home / ".local" / "bin" / "python3.13", "3.13.1 pip")
    after_install = survey("mac-2")
    assert after_install.problem is None
    assert new_python in {path for _, path in after_install.pythons}


@follows_advice(
    "mac-2 ran no command: see what `ssh mac-2 uname` prints",
)
def test_the_command_in_the_error_prints_why_a_host_runs_no_command(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert survey("mac-2").home == str(home)
    refusing_ssh = tmp_path / "refusing" / "ssh"
    refusing_ssh.parent.mkdir()
    refusing_ssh.write_text("#!/bin/sh\necho This account is currently not available.\n")
    refusing_ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{refusing_ssh.parent}:{os.environ['PATH']}")
    with pytest.raises(SetupError, match="mac-2 ran no command: see what") as refused:
        survey("mac-2")
    command = str(refused.value).split("`")[1]
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=20, check=True)
    assert result.stdout == "This account is currently not available.\n"


@pytest.mark.slow
@follows_advice(
    "; if it reaches no package index, give --wheels DIR with the wheels of all packages",
)
def test_a_host_without_a_package_index_installs_from_a_folder_of_wheels(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    host, wheel = survey("mac-2", sys.executable), write_wheel(tmp_path)
    pins = [f"mlx=={importlib.metadata.version('mlx')}"]
    with pytest.raises(SetupError, match="if it reaches no package index, give --wheels DIR with the wheels of all"):
        install(host, wheel, pins, None)
    install(host, wheel, pins, write_stub_wheels(tmp_path / "wheels"))
    assert survey("mac-2", sys.executable).installed_digest == (home / INSTALL_FOLDER / "installed").read_text()
