"""Tests of the health monitor over real processes: stopped stages, silent guards, stuck hops, and what is no fault."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mlx_k2.errors import StageFault, StageSilent
from mlx_k2.launch.group import StageGroup
from mlx_k2.launch.health_monitor import HealthMonitor
from mlx_k2.launch.stage_events import StageMessage
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.protocol.messages import Connected, Step, StepDone
from tests.launch.guarded import STAGE_PROGRAMS, stand_in_python
from tests.processes import started_processes

STALL_TIMEOUT_S = 1.0
RECEIVE_TIMEOUT_S = 60.0
"""Deadline for a message or an error, long enough for a busy machine."""

MakeGroup = Callable[..., StageGroup]


@pytest.fixture
def make_group(tmp_path: Path) -> MakeGroup:
    def make_group(*programs: str, stall_timeout_s: float = STALL_TIMEOUT_S) -> StageGroup:
        locations = [StageLocation(python=stand_in_python(tmp_path, program)) for program in programs]
        return StageGroup(locations, lease_s=20.0, log=lambda _: None, stall_timeout_s=stall_timeout_s)

    return make_group


def monitor_of(group: StageGroup) -> HealthMonitor:
    """Wait until all stages of a group have sent Connected; return the group's monitor."""
    for _ in range(group.size):
        event = group.receive(RECEIVE_TIMEOUT_S)
        assert isinstance(event, StageMessage) and event.message == Connected()
    return HealthMonitor(group)


def error_of(monitor: HealthMonitor) -> str:
    with pytest.raises(StageSilent) as caught:
        monitor.receive(time.monotonic() + RECEIVE_TIMEOUT_S)
    return str(caught.value)


def process_of(program: str) -> psutil.Process:
    """Return the only stage process that runs ``program``, and not its guard."""
    arguments = [str(STAGE_PROGRAMS), program]
    (stage,) = [process for process in started_processes() if process.cmdline()[1:] == arguments]
    return stage


def test_the_error_about_a_suspended_stage_names_this_stage_only(make_group: MakeGroup) -> None:
    with make_group("echo", "has_sent") as group:
        monitor = monitor_of(group)
        process_of("echo").suspend()
        error = error_of(monitor)
    assert re.match(r"stage 0 on this machine \(starting for \d+ s\) is stopped: its process was suspended", error)
    assert "stage 1" not in error


@pytest.mark.slow
def test_a_stage_suspended_for_less_than_the_stall_timeout_continues(make_group: MakeGroup) -> None:
    with make_group("echo", stall_timeout_s=6.0) as group:
        monitor = monitor_of(group)
        stage = process_of("echo")
        stage.suspend()
        assert monitor.receive(time.monotonic() + 2.5) is None
        stage.resume()
        assert monitor.receive(time.monotonic() + 4.5) is None  # until 7 s after the stage was suspended
        group.send(0, Step(1, ()))
        assert monitor.receive(time.monotonic() + RECEIVE_TIMEOUT_S) == StageMessage(0, StepDone(1, busy_s=0.0))


def test_the_error_about_a_suspended_guard_names_the_stage_of_this_guard_only(make_group: MakeGroup) -> None:
    with make_group("has_sent", "echo", stall_timeout_s=2.0) as group:
        monitor = monitor_of(group)
        guard = process_of("echo").parent()
        assert guard is not None
        guard.suspend()
        error = error_of(monitor)
        guard.resume()
    assert re.match(r"stage 1 on this machine \(.*\) does not answer: its host is off, asleep or unreachable", error)
    assert "stage 0" not in error


def test_a_stage_that_waits_for_data_which_was_sent_is_reported_as_a_stuck_hop(make_group: MakeGroup) -> None:
    with make_group("has_sent", "receives") as group:
        error = error_of(monitor_of(group))
    assert re.match(
        r"stage 1 on this machine \(receiving hidden states of step 5 for \d+ s\) does not receive what "
        r"stage 0 on this machine \(waiting for the next step after step 5 for \d+ s\) has sent: "
        r"the hop between them is stuck",
        error,
    )


@pytest.mark.slow
def test_a_stage_that_waits_for_data_which_was_not_sent_yet_is_no_fault(make_group: MakeGroup) -> None:
    with make_group("echo", "receives") as group:
        assert monitor_of(group).receive(time.monotonic() + 3.5) is None


@pytest.mark.slow
def test_a_monitor_whose_process_was_suspended_past_the_stall_timeout_returns_queued_messages_and_no_error(
    make_group: MakeGroup,
) -> None:
    with make_group("echo") as group:
        monitor = monitor_of(group)
        group.send(0, Step(1, ()))
        resumer = subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        resumer.wait()
        assert monitor.receive(time.monotonic()) == StageMessage(0, StepDone(1, busy_s=0.0))
        assert monitor.receive(time.monotonic() - 1) is None  # no error: first the guards get time to answer


def test_a_guard_ends_a_stage_that_exceeds_the_limit_of_its_phase_and_holds_the_gil(make_group: MakeGroup) -> None:
    with make_group("exceeds_its_limit") as group:
        monitor = monitor_of(group)
        # the limit of 0.5 s is printed without decimals
        with pytest.raises(StageFault, match=r"connecting to its neighbours for \d+ s, longer than its limit of 0 s"):
            monitor.receive(time.monotonic() + RECEIVE_TIMEOUT_S)
