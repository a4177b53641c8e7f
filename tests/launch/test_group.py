"""Tests of StageGroup over real local processes that run the programs of stage_programs.py as stages."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from mlx_k2.errors import StageFault, StageStartError
from mlx_k2.launch.group import StageGroup
from mlx_k2.launch.stage_events import StageEnded, StageEvent, StageMessage
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.launch.stage_process import MAX_LINE_BYTES, StageProcess
from mlx_k2.protocol.messages import Connected, Step, StepDone
from tests.launch.guarded import stand_in_python
from tests.local_cluster import is_running, still_running_after
from tests.processes import started_processes

MakeGroup = Callable[..., StageGroup]

RECEIVE_TIMEOUT_S = 60.0
"""Deadline for an event, long enough for a busy machine."""

GROUP_SENDS_SIGNAL = "has not ended: sending"
"""Part of the line that the group logs before it signals a process that did not end in time."""


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def make_group(tmp_path: Path, log: list[str]) -> MakeGroup:
    def make_group(*programs: str) -> StageGroup:
        locations = [StageLocation(python=stand_in_python(tmp_path, program)) for program in programs]
        return StageGroup(locations, lease_s=20.0, log=log.append)

    return make_group


def receive(group: StageGroup, count: int) -> list[StageEvent]:
    """Return the next ``count`` events. Each stage sends Connected first."""
    events: list[StageEvent] = []
    for _ in range(count):
        event = group.receive(RECEIVE_TIMEOUT_S)
        assert event is not None, f"{len(events)} of {count} events came: {events[-3:]}"
        events.append(event)
    return events


def end_among(events: Sequence[StageEvent]) -> StageEnded:
    """Return the only StageEnded of ``events``."""
    (end,) = [event for event in events if isinstance(event, StageEnded)]
    return end


def running_children() -> list[psutil.Process]:
    return [process for process in started_processes() if is_running(process)]


def test_each_stage_answers_in_order_and_no_process_remains_after_the_group(make_group: MakeGroup) -> None:
    with make_group("echo", "echo", "echo") as group:
        assert {event.rank for event in receive(group, 3) if isinstance(event, StageMessage)} == {0, 1, 2}
        for number in range(50):
            group.send_all(Step(number, ()))
        events = receive(group, 3 * 50)
        group.send(1, Step(99, ()))
        assert receive(group, 1) == [StageMessage(1, StepDone(99, busy_s=0.0))]
    for rank in range(3):
        messages = [event.message for event in events if isinstance(event, StageMessage) and event.rank == rank]
        assert messages == [StepDone(number, busy_s=0.0) for number in range(50)]
    assert running_children() == []


def test_receive_returns_none_at_the_timeout(make_group: MakeGroup) -> None:
    with make_group("echo") as group:
        receive(group, 1)
        called_at = time.monotonic()
        assert group.receive(0.2) is None
        assert time.monotonic() - called_at >= 0.2


@pytest.mark.slow
def test_guards_answer_repeatedly_while_their_stages_hold_the_gil(make_group: MakeGroup) -> None:
    with make_group("reads_nothing", "reads_nothing") as group:
        receive(group, 2)
        for rank in (0, 1):
            for _ in range(3):
                silent_s = group.silence_s(rank)
                deadline = time.monotonic() + RECEIVE_TIMEOUT_S
                while group.silence_s(rank) >= silent_s:  # it falls when a frame arrives
                    silent_s = group.silence_s(rank)
                    assert time.monotonic() < deadline, f"the guard of stage {rank} is silent for {silent_s} s"
                    assert group.receive(0.05) is None


def test_the_end_of_a_failed_stage_has_its_exit_code_and_the_tail_of_its_stderr(make_group: MakeGroup) -> None:
    with make_group("echo", "failing") as group:
        end = end_among(receive(group, 3))
        assert (end.rank, end.has_started, end.exit_code, end.signal) == (1, True, 3, None)
        assert end.stderr_tail == ("ValueError: no such layer",)
        error = end.as_error()
        assert isinstance(error, StageFault)
        assert str(error) == (
            "stage 1 on this machine (starting) ended with exit code 3: it ended by itself (it wrote last: "
            "ValueError: no such layer)"
        )
        group.send(1, Step(1, ()))  # sending to an ended stage raises no error
        group.send(0, Step(2, ()))
        assert receive(group, 1) == [StageMessage(0, StepDone(2, busy_s=0.0))]


def test_the_end_of_a_stage_whose_guard_was_killed_names_the_signal(make_group: MakeGroup) -> None:
    with make_group("reads_nothing") as group:
        receive(group, 1)
        (guard,) = started_processes(recursive=False)
        guard.kill()
        end = end_among(receive(group, 1))
        assert end.reason == "its guard was ended by signal 9"


def test_a_stage_that_writes_other_bytes_than_frames_is_ended(make_group: MakeGroup) -> None:
    with make_group("writes_garbage") as group:
        assert "bytes that are not frames" in end_among(receive(group, 2)).reason


def test_ten_megabytes_of_stderr_do_not_block_a_stage_and_are_split_into_lines(
    make_group: MakeGroup, log: list[str]
) -> None:
    with make_group("flooding", "echo") as group:
        receive(group, 2)
        group.send(0, Step(1, ()))
        receive(group, 1)
    assert all(line.startswith("[stage ") for line in log)
    assert sum(len(line) for line in log if line.startswith("[stage 0 this machine]")) > 10_000_000
    assert max(len(line) for line in log) < MAX_LINE_BYTES + 100  # and the name of the stage


def test_no_message_is_lost_when_stages_send_faster_than_receive_is_called(make_group: MakeGroup) -> None:
    with make_group("repeats_answers", "repeats_answers") as group:
        receive(group, 2)
        for number in range(3):
            group.send_all(Step(number, ()))
        assert all(
            isinstance(event, StageMessage) for event in receive(group, 2 * 3 * 1000)
        )  # stages x steps x reports of a step


@pytest.mark.slow
def test_stopping_kills_unresponsive_stages_concurrently_and_logs_which_ones_it_waits_for(
    make_group: MakeGroup, log: list[str]
) -> None:
    with make_group("ignores_signals", "ignores_signals", "echo") as group:
        receive(group, 3)
        group.set_held_bytes(0, 10 * 10**9)
        called_at = time.monotonic()
        group.stop(log.append)
        assert time.monotonic() - called_at >= 6  # 5 s, plus 1 s for each 10 GB
        assert running_children() == []
    assert not any(GROUP_SENDS_SIGNAL in line for line in log)  # the guards killed both at the same time
    assert "waiting for stage 0 on this machine, which holds 10.0 GB, at most 8 s" in log
    assert not any("stage 2" in line for line in log if line.startswith("waiting"))


@pytest.mark.slow
def test_leaving_a_group_with_a_suspended_guard_ends_the_guard_and_its_stage(make_group: MakeGroup) -> None:
    with make_group("echo") as group:
        receive(group, 1)
        processes = running_children()
        (guard,) = started_processes(recursive=False)
        guard.suspend()
    assert still_running_after(processes, RECEIVE_TIMEOUT_S) == []


def test_an_exception_in_the_with_body_ends_the_stages(make_group: MakeGroup) -> None:
    with pytest.raises(RuntimeError), make_group("reads_nothing", "echo"):
        raise RuntimeError
    assert running_children() == []


@pytest.mark.parametrize("is_second_started", [True, False])
def test_an_exception_while_stages_are_started_ends_the_started_stages(
    make_group: MakeGroup, monkeypatch: pytest.MonkeyPatch, is_second_started: bool
) -> None:
    start = StageProcess.start

    def interrupted_start(stage: StageProcess) -> None:
        if stage.rank == 0 or is_second_started:
            start(stage)
        if stage.rank == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(StageProcess, "start", interrupted_start)
    threads = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), make_group("echo", "ignores_signals", "echo"):
        pytest.fail("the body ran")
    assert running_children() == []
    assert set(threading.enumerate()) <= threads


def test_the_end_of_a_stage_whose_python_is_missing_is_a_start_error_with_the_path() -> None:
    with StageGroup([StageLocation(python="/nowhere/python")], lease_s=20.0, log=lambda _: None) as group:
        error = end_among(receive(group, 1)).as_error()
    assert isinstance(error, StageStartError)
    assert str(error) == (
        "stage 0 on this machine did not start: /nowhere/python cannot be started here: No such file or directory"
    )


@pytest.mark.slow
def test_fifteen_closed_groups_leak_no_descriptor_and_no_thread(make_group: MakeGroup) -> None:
    def run_once() -> None:
        with make_group("echo", "failing") as group:
            events = receive(group, 3)
            assert StageMessage(0, Connected()) in events

    run_once()
    num_files, num_threads = psutil.Process().num_fds(), threading.active_count()
    for _ in range(15):
        run_once()
    assert psutil.Process().num_fds() == num_files
    assert threading.active_count() == num_threads


def test_messages_that_are_sent_before_a_stage_is_up_are_delivered_later(make_group: MakeGroup) -> None:
    with make_group("echo") as group:
        group.send(0, Step(1, ()))
        group.send(0, Step(2, ()))
        assert receive(group, 3) == [
            StageMessage(0, Connected()),
            StageMessage(0, StepDone(1, busy_s=0.0)),
            StageMessage(0, StepDone(2, busy_s=0.0)),
        ]
