"""Tests of the ways to end the command: the exit code gives the cause, and no process is left."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cli.command import CommandLine, processes_below
from tests.local_cluster import wait_until_gone

Start = Callable[..., subprocess.Popen[bytes]]

PROCESSES_OF_A_STAGE = 3
"""The guard, the guard's watchdog and the stage itself."""

END_S = 60.0
"""Deadline for the end of a process, long enough for a busy machine."""

LONG_LEASE = ("--lease", "600")
"""A lease longer than every test, so that no stage ends because its lease expired."""

WAITING = b"waiting for stage"
"""Start of the line that the command prints when the stages have not ended after 1 s."""

KILLED_BY_THE_COMMAND = b"has not ended: sending"
"""Text that the command prints before it signals a process that did not end within its time limit."""


@pytest.fixture
def start(command_line: CommandLine, endless: Path) -> Iterator[Start]:
    """Yield a function that starts a long answer. The fixture kills every started command after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str, num_stages: int = 1) -> subprocess.Popen[bytes]:
        model = ("--model", str(endless), "--stages", str(num_stages), "--token-ids", "1,2,3", "--temperature", "0")
        started.append(command_line.start("generate", *model, *options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def answering(process: subprocess.Popen[bytes], num_stages: int = 1) -> list[psutil.Process]:
    """Wait for the first 20 bytes of a running answer. Return all processes that the command started."""
    assert process.stdout
    assert process.stdout.read(20)
    assert process.poll() is None
    below = processes_below(process)
    assert len(below) == num_stages * PROCESSES_OF_A_STAGE
    return below


def wait_for(process: subprocess.Popen[bytes], line: bytes) -> None:
    """Read the stderr of ``process`` up to a line that contains ``line``."""
    assert process.stderr
    for found in process.stderr:
        if line in found:
            return
    raise AssertionError(f"it ended without {line!r}")


@pytest.mark.parametrize(
    ("number", "exit_code", "num_stages"),
    [
        (signal.SIGINT, 130, 2),
        pytest.param(signal.SIGTERM, 143, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_the_middle_of_an_answer_ends_it_and_leaves_nothing(
    start: Start, number: int, exit_code: int, num_stages: int
) -> None:
    process = start(*LONG_LEASE, num_stages=num_stages)
    below = answering(process, num_stages)
    os.killpg(process.pid, number)
    rest, reported = process.communicate(timeout=END_S)
    assert process.returncode == exit_code
    assert wait_until_gone(below, 0) == []
    assert [line for line in reported.splitlines() if not line.startswith(WAITING)] == []
    assert rest.endswith(b"\n")


def test_ctrl_c_during_startup_leaves_no_process(start: Start) -> None:
    process = start("--verbose", num_stages=2)
    wait_for(process, b"connecting ...")
    below = processes_below(process)
    os.killpg(process.pid, signal.SIGINT)
    _, reported = process.communicate(timeout=END_S)
    assert process.returncode == 130
    assert wait_until_gone(below, 0) == []
    assert b"Traceback" not in reported


def test_a_closed_stdout_ends_the_command_with_sigpipe(start: Start) -> None:
    process = start()
    below = answering(process)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.wait(timeout=END_S) == 128 + signal.SIGPIPE
    assert wait_until_gone(below, 0) == []
    assert [line for line in process.stderr.read().splitlines() if not line.startswith(WAITING)] == []


@pytest.mark.slow
def test_killing_the_command_leaves_no_process(start: Start) -> None:
    process = start(*LONG_LEASE, num_stages=2)
    below = answering(process, num_stages=2)
    process.kill()
    process.wait()
    assert wait_until_gone(below, END_S) == []


@pytest.mark.slow
def test_the_command_names_the_stage_it_waits_for_and_a_second_ctrl_c_ends_the_wait(start: Start) -> None:
    process = start("--lease", "2")
    below = answering(process)
    guards = psutil.Process(process.pid).children()
    for guard in guards:
        guard.suspend()
    os.killpg(process.pid, signal.SIGINT)
    wait_for(process, b"waiting for stage 0 on this machine")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=END_S) == 130
    assert process.stderr and KILLED_BY_THE_COMMAND not in process.stderr.read()  # printed only when the wait times out
    assert wait_until_gone(below, END_S) == []


@pytest.fixture
def hangup_ignored() -> Iterator[None]:
    """Ignore SIGHUP during the test, as nohup does. A child process inherits ignored signals."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.usefixtures("hangup_ignored")
def test_a_signal_ignored_by_the_parent_process_stays_ignored(start: Start) -> None:
    process = start("--max-tokens", "100")
    answering(process)
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=END_S)
    assert process.returncode == 0
