"""Tests of the diagnosis of processes that did not start and of lost connections."""

import signal

import pytest

from mlx_k2.launch.diagnosis import explain_lost_connection, explain_start_failure
from mlx_k2.launch.ssh import SSH_EXIT_CODE, WHEEL
from mlx_k2.launch.stage_location import StageLocation

LOCATION = StageLocation(ssh="mac-2", python="/opt/k2/bin/python")
PROBLEM = "the stage's output ended without its opening mark"


@pytest.mark.parametrize(
    ("exit_code", "stderr"),
    [
        (127, "zsh:1: no such file or directory: /opt/k2/bin/python"),
        (127, "bash: line 1: /opt/k2/bin/python: No such file or directory"),
        (126, "bash: line 1: exec: /opt/k2/bin/python: cannot execute: Is a directory"),
        (127, "sh: 1: exec: /opt/k2/bin/python: not found"),
        (127, "fish: Unknown command: /opt/k2/bin/python"),
        (1, "/opt/k2/bin/python: Command not found."),
    ],
)
def test_a_missing_python_is_recognized_in_the_message_of_each_shell(exit_code: int, stderr: str) -> None:
    failure = explain_start_failure(LOCATION, exit_code, stderr, PROBLEM)
    assert failure.reason.startswith("it has no /opt/k2/bin/python: run `make dist` ")
    assert f"`scp dist/{WHEEL} mac-2:` and `ssh mac-2 python3 -m pip install ./{WHEEL}`" in failure.reason
    assert failure.another_may_work


@pytest.mark.parametrize(
    "stderr",
    [
        "/opt/k2/bin/python: Error while finding module specification for 'mlx_k2.stage' "
        "(ModuleNotFoundError: No module named 'mlx_k2')",
        "/opt/k2/bin/python: No module named mlx_k2",
    ],
)
def test_a_python_without_mlx_k2_is_distinguished_from_a_missing_python(stderr: str) -> None:
    failure = explain_start_failure(LOCATION, 1, stderr, PROBLEM)
    assert failure.reason.startswith("its /opt/k2/bin/python has no mlx_k2: run `make dist` ")
    assert f"`ssh mac-2 /opt/k2/bin/python -m pip install ./{WHEEL}`" in failure.reason
    assert failure.another_may_work


def test_a_python_older_than_3_11_is_named_and_another_command_is_tried() -> None:
    stderr = "Unknown option: -P\nusage: /opt/k2/bin/python [option] ... [-c cmd | -m mod | file | -] [arg] ..."
    failure = explain_start_failure(LOCATION, 2, stderr, PROBLEM)
    assert failure.reason.startswith("its /opt/k2/bin/python is older than Python 3.11: give the path of a Python")
    assert failure.another_may_work


@pytest.mark.parametrize(
    ("stderr", "explanation"),
    [
        ("ssh: connect to host mac-2 port 22: Operation timed out", "cannot be reached"),
        ("Connection timed out during banner exchange", "cannot be reached"),
        ("ssh: Could not resolve hostname mac-2: nodename nor servname provided", "cannot be resolved"),
        ("user@mac-2: Permission denied (publickey,password,keyboard-interactive).", "`ssh-copy-id mac-2`"),
        ("something new", "ssh failed: something new; try `ssh mac-2 true`"),
        ("", "ssh failed: it printed no reason; try `ssh mac-2 true`"),
    ],
)
def test_known_ssh_errors_are_explained_and_others_quoted(stderr: str, explanation: str) -> None:
    failure = explain_start_failure(LOCATION, SSH_EXIT_CODE, stderr, PROBLEM)
    assert explanation in failure.reason
    assert not failure.another_may_work


def test_the_reason_of_an_unknown_start_failure_is_the_problem_and_the_last_line_of_stderr() -> None:
    failure = explain_start_failure(LOCATION, 1, "Traceback\nMemoryError", PROBLEM)
    assert failure.reason == f"{PROBLEM}: MemoryError"
    assert not failure.another_may_work


def test_the_explanation_of_a_lost_connection_names_ssh_or_the_guard() -> None:
    assert "ssh connection was lost" in explain_lost_connection(LOCATION, SSH_EXIT_CODE)
    assert explain_lost_connection(StageLocation(), -signal.SIGKILL) == "its guard was ended by signal 9"
    assert explain_lost_connection(StageLocation(), None) == "the connection ended without its guard's last frame"
