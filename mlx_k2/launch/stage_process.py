"""One stage's process, local or over ssh, as seen from the coordinator: sends frames, posts its messages and its end.

Knows no step and no deadline of a step. Its threads never wait for the coordinator, and its methods raise no error for
a broken connection: that is posted as the stage's end, and an end is posted once.
"""

import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import IO

from mlx_k2.errors import ProtocolError
from mlx_k2.launch.diagnosis import explain_lost_connection, explain_start_failure
from mlx_k2.launch.stage_events import StageEnded, StageEvent, StageMessage
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.protocol.framing import Frame, FrameWriter, Kind, read_frame, skip_to_mark
from mlx_k2.protocol.guard_messages import GuardSettings, Phase, PhaseUpdate, StageExit, StageStatus
from mlx_k2.protocol.messages import ToStage, decode_from_stage, encode_message

STDERR_LINES = 200
MAX_LINE_BYTES = 4096
EXIT_S = 2.0
"""Time limit for a process that has closed its output to exit; after it the process counts as ended."""
STDERR_S = 0.5
"""Time limit for reading the rest of stderr after the process has ended."""


class StageProcess:
    """A stage's process, which ``start`` starts on its own thread. ``post`` and ``log`` must not block."""

    def __init__(
        self,
        rank: int,
        location: StageLocation,
        settings: GuardSettings,
        post: Callable[[StageEvent], None],
        log: Callable[[str], None],
    ) -> None:
        self.rank = rank
        self.location = location
        self.received_at = time.monotonic()
        """When the last frame came from the guard; at first the time of creation."""
        self.status = StageStatus(PhaseUpdate(Phase.STARTING), 0.0)
        """The guard's last report; one comes every second."""
        self._settings = settings
        self._post = post
        self._log = log
        self._lock = threading.Lock()  # guards _early, _process, _writer and _closed
        self._early: deque[bytes] | None = deque()  # wait for the guard's opening mark; None after it
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: FrameWriter | None = None
        self._closed = False
        self._fault: str | None = None
        self._stderr_tail: deque[str] = deque(maxlen=STDERR_LINES)
        self._thread = threading.Thread(target=self._run, name=f"stage {rank}", daemon=True)

    def start(self) -> None:
        """Start the process. Do not wait for it.

        Raises:
            RuntimeError: this process can have no more threads.
        """
        self._thread.start()

    @property
    def came_up(self) -> bool:
        """True if the stage's guard has sent its opening mark."""
        return self._early is None

    @property
    def held_bytes(self) -> int:
        """The memory that the stage holds, as last set by ``set_held_bytes``."""
        return self._settings.held_bytes

    def set_held_bytes(self, held_bytes: int) -> None:
        """Send the guard the number of bytes that the stage holds, which gives a larger stage more time to end."""
        self._settings = replace(self._settings, held_bytes=held_bytes)
        self._put(Kind.GUARD_SETTINGS, self._settings.to_json())

    def send(self, message: ToStage) -> None:
        """Queue a message. Drop it if the stage has ended, which a StageEnded event reports."""
        payload = encode_message(message)
        with self._lock:
            if self._early is not None:
                self._early.append(payload)
                return
        self._put(Kind.MESSAGE, payload)

    def beat(self, payload: bytes) -> None:
        """Queue a heartbeat."""
        self._put(Kind.HEARTBEAT, payload)

    def close(self) -> None:
        """Close the stage's input once all queued frames are sent; its guard then ends it. Do not wait.

        A stage that is not up yet holds no memory, and ssh may be waiting for its host, so its process is ended now.
        """
        with self._lock:
            self._closed = True
            if self._writer is not None:
                self._writer.close(timeout_s=0)
            if self._process is not None and self._early is not None:
                self._process.terminate()

    def send_signal(self, number: int) -> None:
        """Send a signal to the local process: the ssh client, or the local guard."""
        with self._lock:
            if self._process is not None:
                self._process.send_signal(number)

    def wait(self, timeout_s: float) -> bool:
        """Wait at most ``timeout_s``; return whether the local process has ended and its end was posted.

        Return True if it was never started.
        """
        if self._thread.ident is None:
            return True
        deadline = time.monotonic() + timeout_s
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, deadline - time.monotonic()))
            return self._process.returncode is not None
        return True

    def _put(self, kind: Kind, payload: bytes) -> None:
        with self._lock:
            if self._writer is None:
                return
            try:
                self._writer.put(kind, payload)
            except ProtocolError as error:
                self._fault = str(error)
                self._writer.close(timeout_s=0)
                if self._process is not None:
                    self._process.terminate()

    # ---- on the stage's own thread

    def _run(self) -> None:
        commands = self.location.start_commands()
        for number, command in enumerate(commands):
            end, another_may_work = self._run_command(command)
            if not another_may_work or number == len(commands) - 1 or self._closed:
                break
            self._log(
                f"{self._prefix} {sys.executable} cannot run mlx_k2 there; trying mlx-k2 on its login shell's PATH"
            )
            self._stderr_tail.clear()
        self._post(end)

    def _run_command(self, command: tuple[str, ...]) -> tuple[StageEnded, bool]:
        """Start one command and follow it to its end; return the end, and whether another command may work."""
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            return self._ended(came_up=False, reason=f"{command[0]} cannot be started here: {error.strerror}"), False
        assert process.stdin and process.stdout and process.stderr
        drain = threading.Thread(target=self._drain, args=[process.stderr], name=f"log {self.rank}", daemon=True)
        drain.start()
        with self._lock:
            self._process = process
            self._writer = FrameWriter(process.stdin, f"stage {self.rank} on {self.location.host}")
            self._writer.put(Kind.GUARD_SETTINGS, self._settings.to_json())
            if self._closed:
                self._writer.close(timeout_s=0)
                process.terminate()
        came_up, stage_exit, fault = self._follow(process.stdout)
        with self._lock:
            self._writer.close(timeout_s=0)
        exit_code = None
        with suppress(subprocess.TimeoutExpired):
            exit_code = process.wait(EXIT_S)
        drain.join(STDERR_S)
        if not came_up:
            failure = explain_start_failure(self.location, exit_code, "\n".join(self._stderr_tail), fault)
            return self._ended(came_up=False, reason=failure.reason), failure.another_may_work
        if stage_exit is not None:
            end = self._ended(True, stage_exit.reason, stage_exit.exit_code, stage_exit.signal)
        else:
            reason = self._fault or fault or explain_lost_connection(self.location, exit_code)
            end = self._ended(came_up=True, reason=reason, prefix="last status: ")
        return end, False

    def _follow(self, stream: IO[bytes]) -> tuple[bool, StageExit | None, str]:
        """Read to the end of the stream; return whether the mark came, the guard's last frame, and the error if any."""
        came_up = False
        stage_exit = None
        fault = ""
        with stream:
            try:
                self._log_shell_output(skip_to_mark(stream))
                came_up = True
                self._send_early()
                while (frame := read_frame(stream)) is not None:
                    self.received_at = time.monotonic()
                    stage_exit = self._on_frame(frame)
            except (ProtocolError, OSError) as error:
                fault = str(error)
        return came_up, stage_exit, fault

    def _send_early(self) -> None:
        with self._lock:
            assert self._writer is not None and self._early is not None
            for payload in self._early:
                self._writer.put(Kind.MESSAGE, payload)
            self.received_at = time.monotonic()
            self._early = None

    def _on_frame(self, frame: Frame) -> StageExit | None:
        if frame.kind is Kind.MESSAGE:
            self._post(StageMessage(self.rank, decode_from_stage(frame.payload)))
        elif frame.kind is Kind.STAGE_STATUS:
            self.status = StageStatus.from_json(frame.payload)
        elif frame.kind is Kind.STAGE_EXIT:
            return StageExit.from_json(frame.payload)
        elif frame.kind is not Kind.HEARTBEAT:
            raise ProtocolError(f"its guard sent a {frame.kind.name} frame")
        return None

    def _log_shell_output(self, output: bytes) -> None:
        if output:
            self._log(f"{self._prefix} its login shell prints {len(output)} bytes before a command starts; skipped:")
            for line in output.decode(errors="replace").splitlines():
                self._log(f"{self._prefix} | {line}")

    def _drain(self, stream: IO[bytes]) -> None:
        with stream:
            while line := stream.readline(MAX_LINE_BYTES):
                text = line.decode(errors="replace").rstrip()
                self._stderr_tail.append(text)
                self._log(f"{self._prefix} {text}")

    @property
    def _prefix(self) -> str:
        return f"[stage {self.rank} {self.location.host}]"

    def _ended(
        self,
        came_up: bool,
        reason: str,
        exit_code: int | None = None,
        signal_number: int | None = None,
        prefix: str = "",
    ) -> StageEnded:
        """Return and log the end. ``prefix`` is a prefix of the status, for a status that may have changed since."""
        status = f"{prefix}{self.status.update}" if came_up else None
        tail = tuple(self._stderr_tail)
        end = StageEnded(self.rank, self.location.host, came_up, reason, exit_code, signal_number, status, tail)
        self._log(f"{self._prefix} {end.how}")
        return end
