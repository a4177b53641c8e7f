"""Tests of signals and a closed stdout: the exit code gives the cause of the end, and no process is left."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cli.command import CommandLine, descendants_of
from tests.local_cluster import still_running_after

Start = Callable[..., subprocess.Popen[bytes]]

PROCESSES_PER_STAGE = 3
"""The guard, the guard's watchdog and the stage itself."""

TIMEOUT_S = 60.0
"""Time limit for the end of a process, long enough for a busy machine."""

LONG_LEASE = ("--lease", "600")
"""A lease longer than every test, so that no stage ends because its lease expired."""

WAITING = b"waiting for stage"
"""Start of the line that the command prints when the stages have not ended after 1 s."""

KILLED_BY_THE_COMMAND = b"has not ended: sending"
"""Text that the command prints before it signals a process that did not end within its time limit."""


@pytest.fixture
def start(command_line: CommandLine, endless_model: Path) -> Iterator[Start]:
    """Yield a function that starts a long answer. Every started command is killed after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str, num_stages: int = 1) -> subprocess.Popen[bytes]:
        model = (
            "--model",
            str(endless_model),
            "--stages",
            str(num_stages),
            "--token-ids",
            "1,2,3",
            "--temperature",
            "0",
        )
        started.append(command_line.start("generate", *model, *options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for_answer(process: subprocess.Popen[bytes], num_stages: int = 1) -> list[psutil.Process]:
    """Wait for the first bytes of a running answer. Return all processes that the command has started."""
    assert process.stdout
    assert process.stdout.read(20)
    assert process.poll() is None
    descendants = descendants_of(process)
    assert len(descendants) == num_stages * PROCESSES_PER_STAGE
    return descendants


def wait_for_line(process: subprocess.Popen[bytes], text: bytes) -> None:
    """Read the stderr of ``process`` up to a line that contains ``text``."""
    assert process.stderr
    assert any(text in line for line in process.stderr), f"the command ended without {text!r}"


def other_lines(errors: bytes) -> list[bytes]:
    """Return the lines of the command's stderr, except those about a stage that takes longer to end."""
    return [line for line in errors.splitlines() if not line.startswith(WAITING)]


@pytest.mark.parametrize(
    ("signal_number", "exit_code", "num_stages"),
    [
        (signal.SIGINT, 130, 2),
        pytest.param(signal.SIGTERM, 143, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_the_middle_of_an_answer_ends_it_and_leaves_nothing(
    start: Start, signal_number: int, exit_code: int, num_stages: int
) -> None:
    process = start(*LONG_LEASE, num_stages=num_stages)
    descendants = wait_for_answer(process, num_stages)
    os.killpg(process.pid, signal_number)
    answer, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == exit_code
    assert still_running_after(descendants, 0) == []
    assert other_lines(errors) == []
    assert answer.endswith(b"\n")


def test_ctrl_c_during_startup_leaves_no_process(start: Start) -> None:
    process = start("--verbose", num_stages=2)
    wait_for_line(process, b"connecting ...")
    descendants = descendants_of(process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert still_running_after(descendants, 0) == []
    assert b"Traceback" not in errors


def test_a_closed_stdout_ends_the_command_with_the_exit_code_of_sigpipe(start: Start) -> None:
    process = start()
    descendants = wait_for_answer(process)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.wait(timeout=TIMEOUT_S) == 128 + signal.SIGPIPE
    assert still_running_after(descendants, 0) == []
    assert other_lines(process.stderr.read()) == []


@pytest.mark.slow
def test_killing_the_command_leaves_no_process(start: Start) -> None:
    process = start(*LONG_LEASE, num_stages=2)
    descendants = wait_for_answer(process, num_stages=2)
    process.kill()
    process.wait()
    assert still_running_after(descendants, TIMEOUT_S) == []


@pytest.mark.slow
def test_the_command_names_the_stage_it_waits_for_and_a_second_ctrl_c_ends_the_wait(start: Start) -> None:
    process = start("--lease", "2")  # a watchdog ends the stage of a guard that has been suspended for this time
    descendants = wait_for_answer(process)
    guards = psutil.Process(process.pid).children()
    for guard in guards:
        guard.suspend()
    os.killpg(process.pid, signal.SIGINT)
    wait_for_line(process, b"waiting for stage 0 on this machine")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=TIMEOUT_S) == 130
    assert process.stderr and KILLED_BY_THE_COMMAND not in process.stderr.read()  # printed only when the wait times out
    assert still_running_after(descendants, TIMEOUT_S) == []


@pytest.fixture
def ignored_sighup() -> Iterator[None]:
    """Ignore SIGHUP during the test, as nohup does. A child process inherits ignored signals."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, handler)


@pytest.mark.slow
@pytest.mark.usefixtures("ignored_sighup")
def test_a_signal_ignored_by_the_parent_process_stays_ignored(start: Start) -> None:
    process = start("--max-tokens", "100")
    wait_for_answer(process)
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
