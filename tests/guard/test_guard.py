"""Tests of the guard as a process, with the programs of tests/launch/stage_programs.py as its stage.

The test writes and reads the guard's frames in place of a coordinator.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from mlx_k2.errors import ProtocolError
from mlx_k2.guard.guard import TICK_S
from mlx_k2.protocol.framing import MAX_QUEUED_FRAMES, Frame, Kind, encode_frame, read_frame, skip_to_mark
from mlx_k2.protocol.guard_messages import GuardSettings, Phase, PhaseUpdate, StageStatus
from mlx_k2.protocol.messages import Connected, Step, StepDone, Stop, decode_from_stage, encode_message
from tests.launch import guarded
from tests.local_cluster import is_running

TIMEOUT_S = 60.0
"""Deadline for the end of processes, long enough for a busy machine."""

DEFAULT_LEASE_S = GuardSettings().lease_s
LONG_LEASE_S = 600.0
"""A lease longer than every test, so that no stage ends because its lease expires."""


class GuardedStage:
    """A running guard, its watchdog and its stage, which runs a program of `stage_programs.py`."""

    def __init__(self, program: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, guarded.__file__, program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # as a coordinator starts it
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.streams = (self.process.stdin, self.process.stdout, self.process.stderr)
        self._input, self.output, self._log = self.streams
        self.send_settings()
        assert skip_to_mark(self.output) == b""
        assert decode_from_stage(self.read().payload) == Connected()
        self.guard = psutil.Process(self.process.pid)
        self.descendants = self.guard.children(recursive=True)
        self.all_processes = [self.guard, *self.descendants]

    @property
    def stage(self) -> psutil.Process:
        return next(process for process in self.descendants if "stage_programs.py" in " ".join(process.cmdline()))

    @property
    def watchdog(self) -> psutil.Process:
        return next(process for process in self.descendants if "mlx_k2.guard.watchdog" in process.cmdline())

    def write(self, kind: Kind, payload: bytes) -> None:
        self._input.write(encode_frame(kind, payload))
        self._input.flush()

    def write_raw(self, data: bytes) -> None:
        self._input.write(data)
        self._input.flush()

    def send_settings(self, lease_s: float = DEFAULT_LEASE_S, held_bytes: int = 0) -> None:
        self.write(Kind.GUARD_SETTINGS, GuardSettings(lease_s, held_bytes).to_json())

    def send_step(self, number: int) -> None:
        self.write(Kind.MESSAGE, encode_message(Step(number, ())))

    def close_input(self) -> None:
        self._input.close()

    def status(self) -> StageStatus:
        """Return the stage status that the guard sends with its answer to a heartbeat."""
        self.write(Kind.HEARTBEAT, b"")
        return StageStatus.from_json(self.read(Kind.STAGE_STATUS).payload)

    def read(self, kind: Kind | None = None) -> Frame:
        """Skip other frames; return the next one of ``kind``, or for None the next one that is not a stage status."""
        while True:
            frame = read_frame(self.output)
            assert frame is not None, f"the guard has ended: {self.log()}"
            if frame.kind is kind or (kind is None and frame.kind is not Kind.STAGE_STATUS):
                return frame

    def log(self) -> str:
        return self._log.read().decode()

    def last_frame(self) -> dict[str, object]:
        """Read to the end of the output; return the JSON of the last frame, which states how the stage ended."""
        last = None
        while (frame := read_frame(self.output)) is not None:
            last = frame
        assert last is not None and last.kind is Kind.STAGE_EXIT
        return dict(json.loads(last.payload))

    def wait_until_gone(self, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until every process is gone."""
        deadline = time.monotonic() + timeout_s
        while running := [process for process in self.all_processes if is_running(process)]:
            assert time.monotonic() < deadline, f"still running after {timeout_s} s: {running}"
            self.process.poll()
            time.sleep(0.01)


Start = Callable[[str], GuardedStage]


@pytest.fixture
def start() -> Iterator[Start]:
    """Yield a function that starts a guarded stage with a program. Kill the processes of all stages after the test."""
    stages: list[GuardedStage] = []

    def start_stage(program: str) -> GuardedStage:
        stages.append(GuardedStage(program))
        return stages[-1]

    yield start_stage
    for stage in stages:
        for process in stage.all_processes:
            if is_running(process):
                process.kill()
        stage.process.wait(TIMEOUT_S)
        for stream in stage.streams:
            with suppress(BrokenPipeError):  # closing writes the data that is still buffered
                stream.close()


def test_messages_are_relayed_both_ways_and_heartbeats_are_answered(start: Start) -> None:
    stage = start("echo")
    stage.write(Kind.HEARTBEAT, b"beat 1")
    assert stage.read() == Frame(Kind.HEARTBEAT, b"beat 1")
    for number in range(1000):
        stage.send_step(number)
    for number in range(1000):
        assert decode_from_stage(stage.read().payload) == StepDone(number=number, busy_s=0.0, receive_s=0.0)


def test_a_heartbeat_is_answered_while_the_stage_holds_the_gil(start: Start) -> None:
    stage = start("reads_nothing")
    stage.write(Kind.HEARTBEAT, b"beat 1")
    assert stage.read() == Frame(Kind.HEARTBEAT, b"beat 1")


def test_a_stage_that_receives_stop_exits_by_itself(start: Start) -> None:
    stage = start("echo")
    stage.write(Kind.MESSAGE, encode_message(Stop()))
    assert stage.last_frame() == {"exit_code": 0, "signal": None, "reason": "it ended by itself"}
    assert stage.process.wait(TIMEOUT_S) == 0
    stage.wait_until_gone()


def test_a_closed_connection_ends_the_stage_with_exit_code_0(start: Start) -> None:
    stage = start("echo")
    stage.close_input()
    assert stage.last_frame() == {"exit_code": 0, "signal": None, "reason": "the coordinator closed the connection"}


@pytest.mark.parametrize("program", ["reads_nothing", "with_child", "repeats_answers"])
def test_no_process_is_left_when_the_coordinator_closes_its_connections(start: Start, program: str) -> None:
    stage = start(program)
    stage.send_settings(lease_s=LONG_LEASE_S)
    if program == "repeats_answers":
        for number in range(100):  # 100,000 answers, which fill the output because nobody reads it
            stage.send_step(number)
    stage.close_input()
    stage.output.close()
    stage.wait_until_gone()


@pytest.mark.slow
def test_a_stage_that_ignores_stop_and_sigterm_is_killed_after_its_grace_period(start: Start) -> None:
    stage = start("ignores_signals")
    stage.send_settings(held_bytes=10 * 10**9)
    started_at = time.monotonic()
    stage.close_input()
    assert stage.last_frame()["signal"] == signal.SIGKILL
    assert time.monotonic() - started_at >= 6  # 5 s, plus 1 s for each 10 GB


@pytest.mark.slow
def test_the_stage_ends_when_no_heartbeat_comes_within_the_lease(start: Start) -> None:
    stage = start("reads_nothing")
    stage.send_settings(lease_s=2.0)
    for _ in range(6):
        time.sleep(0.4)  # the test needs real time: 2.4 s in all, longer than the lease
        stage.write(Kind.HEARTBEAT, b"")
        assert stage.read().kind is Kind.HEARTBEAT
    assert stage.last_frame() == {
        "exit_code": None,
        "signal": signal.SIGTERM,
        "reason": "nothing came from the coordinator for 2 s",
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_guard_ends_the_stage(start: Start, number: signal.Signals) -> None:
    stage = start("reads_nothing")
    stage.process.send_signal(number)
    assert stage.last_frame() == {"exit_code": None, "signal": signal.SIGTERM, "reason": f"{number.name} on its host"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no frame at all", "carries bytes that are not frames"),
        (encode_frame(Kind.GUARD_SETTINGS, b"{}"), "not a GuardSettings"),
        (encode_frame(Kind.STAGE_EXIT, b""), "the coordinator sent a STAGE_EXIT frame"),
    ],
)
def test_an_unexpected_frame_ends_the_stage(start: Start, data: bytes, reason: str) -> None:
    stage = start("echo")
    stage.write_raw(data)
    assert reason in str(stage.last_frame()["reason"])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", ""),
        (encode_frame(Kind.HEARTBEAT, b""), "first frame is a HEARTBEAT frame"),
        (b"no frame", "bytes that are not frames"),
    ],
)
def test_without_settings_as_the_first_frame_the_guard_starts_no_stage(data: bytes, error: str) -> None:
    command = [sys.executable, guarded.__file__, "echo"]
    guard = subprocess.run(command, input=data, capture_output=True, timeout=TIMEOUT_S)
    assert guard.returncode == 1
    assert guard.stdout == b""  # not even the opening mark
    assert error in guard.stderr.decode()
    assert bool(guard.stderr) == bool(error)  # an end of the input without a frame is no error


def test_the_stage_gets_the_environment_in_the_first_settings() -> None:
    settings = GuardSettings(environment=("MLX_OF_THE_HOSTFILE=a=b", "HOME=/nowhere"))
    stage_script = "import os; os.write(2, (os.environ['MLX_OF_THE_HOSTFILE'] + ' ' + os.environ['HOME']).encode())"
    guard_script = (
        "import os, sys; from mlx_k2.guard.guard import run_guard; "
        f"os._exit(run_guard([sys.executable, '-c', {stage_script!r}]))"
    )
    guard = subprocess.run(
        [sys.executable, "-c", guard_script],
        input=encode_frame(Kind.GUARD_SETTINGS, settings.to_json()),
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    assert guard.stderr == b"a=b /nowhere"


@pytest.mark.parametrize("program", ["echo", "reads_nothing", "with_child"])
def test_no_process_is_left_when_the_guard_is_killed(start: Start, program: str) -> None:
    stage = start(program)
    stage.send_settings(lease_s=LONG_LEASE_S)
    stage.process.kill()
    stage.wait_until_gone()


@pytest.mark.slow
def test_the_watchdog_kills_a_stage_that_ignores_sigterm_after_its_guard_is_killed(start: Start) -> None:
    stage = start("ignores_signals")
    started_at = time.monotonic()
    stage.process.kill()
    stage.wait_until_gone()
    assert time.monotonic() - started_at >= 5


@pytest.mark.slow
def test_a_suspended_guard_and_its_stage_are_ended_after_the_lease(start: Start) -> None:
    stage = start("reads_nothing")
    stage.send_settings(lease_s=2.0)
    first_age_s = stage.status().for_s
    while stage.status().for_s < first_age_s + 2 * TICK_S:
        pass  # between two ticks the guard sends the new lease to the watchdog
    stage.guard.suspend()
    stage.wait_until_gone(timeout_s=DEFAULT_LEASE_S - 2)  # too early for the lease of the first settings


def test_sigterm_ends_a_suspended_stage(start: Start) -> None:
    stage = start("echo")
    stage.stage.suspend()
    stage.close_input()
    assert stage.last_frame()["signal"] == signal.SIGTERM
    stage.wait_until_gone()


def test_a_killed_watchdog_does_not_end_the_stage(start: Start) -> None:
    stage = start("echo")
    stage.watchdog.kill()
    stage.send_step(1)
    assert stage.read().kind is Kind.MESSAGE
    stage.close_input()
    assert stage.last_frame()["exit_code"] == 0


def test_the_last_frame_holds_the_stages_exit_code_or_signal(start: Start) -> None:
    assert start("failing").last_frame() == {"exit_code": 3, "signal": None, "reason": "it ended by itself"}
    assert start("crashing").last_frame()["signal"] == signal.SIGSEGV


def test_a_stage_that_writes_bytes_that_are_not_frames_is_ended(start: Start) -> None:
    last_frame = start("writes_garbage").last_frame()
    assert last_frame["signal"] == signal.SIGTERM
    assert "bytes that are not frames" in str(last_frame["reason"])


def test_a_stage_that_stops_reading_is_ended_with_that_reason(start: Start) -> None:
    stage = start("reads_nothing")
    for number in range(4 * MAX_QUEUED_FRAMES):  # the guard queues a quarter; the pipes hold less than the rest
        try:
            stage.send_step(number)
        except BrokenPipeError:
            break
    assert "the stage has stopped reading" in str(stage.last_frame()["reason"])


def test_the_child_processes_of_a_stage_end_with_it(start: Start) -> None:
    stage = start("with_child")
    assert "sleep" in [process.name() for process in stage.descendants]
    stage.write(Kind.MESSAGE, encode_message(Stop()))
    stage.last_frame()
    stage.wait_until_gone()


def test_the_guard_imports_only_the_standard_library(tmp_path: Path) -> None:
    script = "import sys, mlx_k2.stage.__main__; print({'msgspec', 'mlx', 'numpy'} & sys.modules.keys())"
    python = subprocess.run(
        [sys.executable, "-S", "-c", script],  # -S: without installed packages
        env={**os.environ, "PYTHONPATH": str(Path(guarded.__file__).parents[2])},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert python.stdout == "set()\n", python.stderr


def test_a_heartbeat_returns_the_stage_status_with_phase_age_and_stopped_time(start: Start) -> None:
    stage = start("receives")
    stage.stage.suspend()
    statuses = [stage.status()]
    while not statuses[-1].stopped_s:
        statuses.append(stage.status())
    reported_by_the_stage = PhaseUpdate(Phase.RECEIVING, step=5, limit_s=600.0)
    assert {status.update for status in statuses} == {reported_by_the_stage}
    assert statuses[-1].for_s > 0
    stage.stage.resume()
    while stage.status().stopped_s:
        pass


def test_a_malformed_phase_update_or_stage_status_is_refused() -> None:
    for payload in (b"", b"[]", b'{"phase": "dancing"}', b'{"phase": "starting", "step": -1, "limit_s": null}'):
        with pytest.raises(ProtocolError, match="not a PhaseUpdate"):
            PhaseUpdate.from_json(payload)
        with pytest.raises(ProtocolError, match="not a StageStatus"):
            StageStatus.from_json(payload)
