"""The guard of one stage: owns the pipe to the coordinator, relays frames, answers heartbeats, ends the stage.

The guard is a separate process, so that it works while the stage holds the GIL (mlx.distributed.init can hold it
forever). Standard library only. It decodes no MESSAGE payload. Once there is a stage it writes nothing to stderr, which
may be a full pipe; its last frame states why the stage ended.
"""

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from mlx_k2.errors import ProtocolError
from mlx_k2.guard.watchdog import Watch
from mlx_k2.protocol.framing import MARK, Frame, FrameReader, FrameWriter, Kind, read_frame
from mlx_k2.protocol.guard_messages import (
    ENDED_BY_ITSELF,
    TERMINATE_AFTER_S,
    GuardSettings,
    Phase,
    PhaseUpdate,
    StageExit,
    StageStatus,
    kill_after_s,
)

TICK_S = 0.25  # time between two checks of the stage
FIRST_FRAME_S = 20  # time limit for the coordinator's first frame. The stage is started after it
LAST_FRAMES_S = 1.0
"""Time limit for reading the stage's last frames, and again for writing the guard's own."""
AFTER_KILL_S = 60.0
"""Time limit for a killed process to exit; after it the guard stops waiting."""


def run_guard(child_command: Sequence[str]) -> int:
    """Run ``child_command`` between this process's stdin and stdout until it has ended; return an exit code.

    The child reads frames from its fd 0 and writes frames to its fd 1. It is started after the coordinator's first
    frame, GUARD_SETTINGS. If stdin ends before it, nothing is started and the code is 1. The caller should end this
    process with os._exit, because a thread may still be blocked on stdin or stdout.

    Raises:
        ProtocolError: the first frame is of another kind, or malformed.
    """
    to_coordinator = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed goes to stderr
    from_coordinator = os.fdopen(os.dup(0), "rb")
    signal.alarm(FIRST_FRAME_S)  # ends this process, which has no stage yet
    first = read_frame(from_coordinator)
    signal.alarm(0)
    if first is None:
        return 1
    if first.kind is not Kind.GUARD_SETTINGS:
        raise ProtocolError(f"the coordinator's first frame is a {first.kind.name} frame")
    settings = GuardSettings.from_json(first.payload)
    return _Guard(child_command, from_coordinator, to_coordinator, settings).run()


class _Guard:
    def __init__(
        self, command: Sequence[str], from_coordinator: IO[bytes], to_coordinator: IO[bytes], settings: GuardSettings
    ) -> None:
        self._settings = settings
        self._has_received = True  # a frame came from the coordinator since the last tick
        self._clock = _StageClock()
        # reasons to end the stage; None: the stage has ended. SimpleQueue.put is safe in a signal handler
        self._reasons: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: self._reasons.put(f"{signal.Signals(number).name} on its host"))
        # Start processes before threads, so that no fork happens in a process that has threads.
        self._watchdog = subprocess.Popen(
            [sys.executable, "-P", "-m", "mlx_k2.guard.watchdog"], stdin=subprocess.PIPE, process_group=0
        )
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=self._watchdog.pid,
            env=os.environ | dict(line.split("=", 1) for line in settings.environment),
        )
        if sys.platform == "darwin":  # keep this Mac awake while the guard runs
            caffeinate = ["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())]
            subprocess.Popen(caffeinate, stdin=subprocess.DEVNULL, process_group=self._watchdog.pid)
        assert self._watchdog.stdin and self._child.stdin and self._child.stdout
        os.set_blocking(self._watchdog.stdin.fileno(), False)
        self._to_coordinator = FrameWriter(to_coordinator, "the coordinator")
        self._to_coordinator.put_raw(MARK)
        self._to_child = FrameWriter(self._child.stdin, "the stage")
        self._from_child = FrameReader(self._child.stdout, "the stage", self._on_child_frame, self._on_child_end)
        FrameReader(from_coordinator, "the coordinator", self._on_coordinator_frame, self._on_coordinator_end)

    def run(self) -> int:
        """Run until the stage has ended; return 0 if its exit code was 0, else 1."""
        reason = self._wait_for_reason()
        if reason is not None:
            self._end_child()
        returncode = self._child.poll()
        with suppress(ProcessLookupError, PermissionError):  # the second is macOS's for processes that have ended
            os.killpg(self._watchdog.pid, signal.SIGKILL)  # also kills processes that the stage started
        self._watchdog.wait(AFTER_KILL_S)
        self._from_child.join(LAST_FRAMES_S)
        if reason is None:
            reason = self._queued_reason()  # for instance: the stage's last output was not a frame
        stage_exit = StageExit.from_returncode(returncode, reason or ENDED_BY_ITSELF)
        with suppress(ProtocolError):  # the coordinator has stopped reading
            self._to_coordinator.put(Kind.STAGE_STATUS, self._clock.status.to_json())
            self._to_coordinator.put(Kind.STAGE_EXIT, stage_exit.to_json())
        self._to_coordinator.close(LAST_FRAMES_S)
        return 0 if returncode == 0 else 1

    def _wait_for_reason(self) -> str | None:
        """Wait until the stage must end, and return why; return None if it has ended by itself."""
        silent_s = 0.0  # counted in ticks, so that the time for which this host sleeps is not silence
        while self._child.poll() is None:
            self._feed_watchdog()
            with suppress(queue.Empty):
                if (reason := self._reasons.get(timeout=TICK_S)) is not None:
                    return reason
                continue  # the stage has ended
            silent_s = 0.0 if self._has_received else silent_s + TICK_S
            self._has_received = False
            self._clock.tick(TICK_S, self._child.pid)
            if (overdue := self._clock.overdue()) is not None:
                return overdue
            if silent_s >= self._settings.lease_s:
                return f"nothing came from the coordinator for {self._settings.lease_s:g} s"
        return None

    def _queued_reason(self) -> str | None:
        """Return the first reason in the queue; None if it has none."""
        while not self._reasons.empty():
            if (reason := self._reasons.get()) is not None:
                return reason
        return None

    def _end_child(self) -> None:
        """Close the stage's input; then send SIGTERM, which a suspended process gets after SIGCONT; then SIGKILL."""
        self._to_child.close(timeout_s=0)
        began = time.monotonic()
        if self._child_ends_by(began + TERMINATE_AFTER_S):
            return
        self._child.send_signal(signal.SIGTERM)
        self._child.send_signal(signal.SIGCONT)
        if self._child_ends_by(began + kill_after_s(self._settings.held_bytes)):
            return
        self._child.kill()
        self._child_ends_by(time.monotonic() + AFTER_KILL_S)

    def _child_ends_by(self, deadline: float) -> bool:
        """Wait for the stage's end until the deadline (monotonic seconds); return whether it has ended."""
        while self._child.poll() is None and (left_s := deadline - time.monotonic()) > 0:
            self._feed_watchdog()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(min(left_s, TICK_S))
        return self._child.poll() is not None

    def _feed_watchdog(self) -> None:
        watch = Watch(self._child.pid, kill_after_s(self._settings.held_bytes), self._settings.lease_s)
        assert self._watchdog.stdin
        with suppress(OSError):  # the watchdog is suspended (the pipe is full) or was killed; the stage continues
            os.write(self._watchdog.stdin.fileno(), watch.to_line())

    # ---- on the reading threads

    def _on_coordinator_frame(self, frame: Frame) -> None:
        self._has_received = True
        if frame.kind is Kind.MESSAGE:
            self._to_child.put(Kind.MESSAGE, frame.payload)
        elif frame.kind is Kind.HEARTBEAT:
            self._to_coordinator.put(Kind.STAGE_STATUS, self._clock.status.to_json())
            self._to_coordinator.put(Kind.HEARTBEAT, frame.payload)
        elif frame.kind is Kind.GUARD_SETTINGS:
            self._settings = GuardSettings.from_json(frame.payload)
        else:
            raise ProtocolError(f"the coordinator sent a {frame.kind.name} frame")

    def _on_coordinator_end(self, error: ProtocolError | None) -> None:
        self._reasons.put(str(error) if error else "the coordinator closed the connection")

    def _on_child_frame(self, frame: Frame) -> None:
        if frame.kind is Kind.MESSAGE:
            self._to_coordinator.put(Kind.MESSAGE, frame.payload)
        elif frame.kind is Kind.STAGE_STATUS:
            self._clock.on_phase(PhaseUpdate.from_json(frame.payload))
        else:
            raise ProtocolError(f"the stage wrote a {frame.kind.name} frame")

    def _on_child_end(self, error: ProtocolError | None) -> None:
        """Queue a reason to end the stage, or None if its output ended between frames and its process ends soon."""
        if error is not None:
            self._reasons.put(f"in the stage's output: {error}")
            return
        try:
            self._child.wait(TERMINATE_AFTER_S)
        except subprocess.TimeoutExpired:
            self._reasons.put("the stage closed its output and did not end")
        else:
            self._reasons.put(None)


class _StageClock:
    """The stage's last phase update, and the time since then.

    Time is counted in ticks of the guard, so that the time for which this host sleeps does not count.
    """

    def __init__(self) -> None:
        self.status = StageStatus(PhaseUpdate(Phase.STARTING), 0.0)  # replaced, never changed: two threads set it
        self._is_stopped = False

    def on_phase(self, update: PhaseUpdate) -> None:
        """Store the stage's new phase and restart the clock."""
        self.status = StageStatus(update, 0.0)

    def tick(self, tick_s: float, pid: int) -> None:
        """Add ``tick_s`` to the clock, and check whether process ``pid``, a child of this process, is suspended."""
        before = self.status
        self._is_stopped = _is_stopped(pid, self._is_stopped)
        stopped_s = before.stopped_s + tick_s if self._is_stopped else 0.0
        aged = StageStatus(before.update, before.for_s + tick_s, stopped_s)
        if self.status is before:  # else on_phase has replaced it meanwhile
            self.status = aged

    def overdue(self) -> str | None:
        """Return why the stage must end if its phase has lasted longer than its limit, else None."""
        status = self.status
        limit_s = status.update.limit_s
        if limit_s is None or status.for_s <= limit_s:
            return None
        return f"it was {status.update} for {status.for_s:.0f} s, longer than its limit of {limit_s:.0f} s"


def _is_stopped(pid: int, was_stopped: bool) -> bool:
    """Return whether a child is suspended, by a signal or a debugger. Do not collect its exit status.

    ``was_stopped`` is the last result. Python has no waitid on macOS before 3.13. There the result is always False, and
    a suspended stage is found only as a stuck hop or by the limit of its step.
    """
    if sys.platform == "darwin" and not hasattr(os, "waitid"):
        return False
    is_stopped = was_stopped
    with suppress(ChildProcessError):
        while (change := os.waitid(os.P_PID, pid, os.WSTOPPED | os.WCONTINUED | os.WNOHANG)) is not None:
            is_stopped = change.si_code in (os.CLD_STOPPED, os.CLD_TRAPPED)
    return is_stopped
