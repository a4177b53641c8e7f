"""Tests of what a survey of a host says about its Pythons. tests/emulated_hosts/test_setup.py installs over ssh."""

import pytest

from mlx_k2.launch.remote_install import HostSurvey


def survey_of(*pythons: tuple[tuple[int, ...], str], python: str | None = None) -> HostSurvey:
    return HostSurvey(
        host="mac-2",
        home="/Users/kim",
        system="macOS 26.3",
        memory_bytes=512 * 10**9,
        pythons=pythons,
        python=python,
        installed="",
    )


@pytest.mark.parametrize(
    ("pythons", "words"),
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
def test_a_host_without_a_usable_python_is_named_with_the_way_out(
    pythons: tuple[tuple[tuple[int, ...], str], ...], words: str
) -> None:
    problem = survey_of(*pythons).problem
    assert problem is not None
    assert words in problem


def test_a_host_with_a_usable_python_has_no_problem_and_an_environment_in_its_home() -> None:
    found = survey_of(((3, 13, 1), "/opt/homebrew/bin/python3.13"), python="/opt/homebrew/bin/python3.13")
    assert found.problem is None
    assert found.environment_python == "/Users/kim/.local/share/mlx-k2/env/bin/python"
