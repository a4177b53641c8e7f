"""One stage's process, local or over ssh, as seen from the coordinator: sends frames, posts the stage's events.

Knows no step and no deadline of a step. The last event is the stage's end, also after a broken connection, for which
no method raises an error.
"""

import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import IO

from mlx_k2.errors import ProtocolError
from mlx_k2.launch.diagnosis import explain_lost_connection, explain_start_failure
from mlx_k2.launch.stage_events import StageEnded, StageEvent, StageMessage
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.protocol.framing import Frame, FrameWriter, Kind, read_frame, skip_to_mark
from mlx_k2.protocol.guard_messages import GuardSettings, Phase, PhaseUpdate, StageExit, StageStatus
from mlx_k2.protocol.messages import ToStage, decode_from_stage, encode_message

STDERR_LINES = 200  # last lines of stderr that are kept
MAX_LINE_BYTES = 4096  # longer lines of stderr are divided
EXIT_WAIT_S = 2.0
"""Time limit for a process that has closed its output to exit; after it the process counts as ended."""
STDERR_WAIT_S = 0.5
"""Time limit for reading the rest of stderr after the process has ended."""


@dataclass
class _Output:
    """The guard's last frame, and the error of reading, if any."""

    stage_exit: StageExit | None = None
    error: str = ""


class StageProcess:
    """A stage's process, and the threads that read from it. They call ``post`` and ``log``, which must not block."""

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
        """The time of the guard's last frame (time.monotonic); at first the time of creation."""
        self.status = StageStatus(PhaseUpdate(Phase.STARTING), 0.0)
        """The guard's last report; one comes every second."""
        self._settings = settings
        self._post = post
        self._log = log
        self._lock = threading.Lock()  # protects _early_messages, _process, _writer and _is_closed
        self._early_messages: deque[bytes] | None = deque()
        """Messages that wait for the guard's opening mark; None once it has come."""
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: FrameWriter | None = None
        self._is_closed = False
        self._write_error: str | None = None
        self._stderr_tail: deque[str] = deque(maxlen=STDERR_LINES)
        self._thread = threading.Thread(target=self._run, name=f"stage {rank}", daemon=True)

    def start(self) -> None:
        """Start the process. Do not wait for it.

        Raises:
            RuntimeError: this process can have no more threads.
        """
        self._thread.start()

    @property
    def has_started(self) -> bool:
        """True if the stage's guard has sent its opening mark."""
        return self._early_messages is None

    @property
    def held_bytes(self) -> int:
        """The memory that the stage holds, as last set by ``set_held_bytes``."""
        return self._settings.held_bytes

    def set_held_bytes(self, held_bytes: int) -> None:
        """Send the guard the number of bytes that the stage holds. A stage that holds more gets more time to end."""
        self._settings = replace(self._settings, held_bytes=held_bytes)
        self._put(Kind.GUARD_SETTINGS, self._settings.to_json())

    def send(self, message: ToStage) -> None:
        """Queue a message. Drop it if the stage has ended, which a StageEnded event reports."""
        payload = encode_message(message)
        with self._lock:
            if self._early_messages is not None:
                self._early_messages.append(payload)
                return
        self._put(Kind.MESSAGE, payload)

    def beat(self, payload: bytes) -> None:
        """Queue a heartbeat."""
        self._put(Kind.HEARTBEAT, payload)

    def close(self) -> None:
        """Close the stage's input once all queued frames are sent; its guard then ends it. Do not wait.

        End the process now if the guard has not started: there is no stage yet, and ssh may be waiting for its host.
        """
        with self._lock:
            self._is_closed = True
            if self._writer is not None:
                self._writer.close(timeout_s=0)
            if self._process is not None and not self.has_started:
                self._process.terminate()

    def send_signal(self, number: int) -> None:
        """Send a signal to the local process: the ssh client, or the local guard."""
        with self._lock:
            if self._process is not None:
                self._process.send_signal(number)

    def wait(self, timeout_s: float) -> bool:
        """Wait at most ``timeout_s`` until the process has ended and its end is posted; return whether this is so.

        Return True if the process was never started.
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
        """Queue a frame. End the process if it has stopped reading."""
        with self._lock:
            if self._writer is None:
                return
            try:
                self._writer.put(kind, payload)
            except ProtocolError as error:
                self._write_error = str(error)
                self._writer.close(timeout_s=0)
                if self._process is not None:
                    self._process.terminate()

    # ---- on the stage's own thread

    def _run(self) -> None:
        commands = self.location.start_commands()
        for number, command in enumerate(commands):
            end, another_may_work = self._run_command(command)
            if not another_may_work or number == len(commands) - 1 or self._is_closed:
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
            return self._log_end(f"{command[0]} cannot be started here: {error.strerror}"), False
        assert process.stdin and process.stdout and process.stderr
        drain = threading.Thread(target=self._drain, args=[process.stderr], name=f"log {self.rank}", daemon=True)
        drain.start()
        with self._lock:
            self._process = process
            self._writer = FrameWriter(process.stdin, f"stage {self.rank} on {self.location.host}")
            self._writer.put(Kind.GUARD_SETTINGS, self._settings.to_json())
            if self._is_closed:
                self._writer.close(timeout_s=0)
                process.terminate()
        output = self._read_output(process.stdout)
        with self._lock:
            self._writer.close(timeout_s=0)
        exit_code = None
        with suppress(subprocess.TimeoutExpired):
            exit_code = process.wait(EXIT_WAIT_S)
        drain.join(STDERR_WAIT_S)
        if not self.has_started:
            failure = explain_start_failure(self.location, exit_code, "\n".join(self._stderr_tail), output.error)
            return self._log_end(failure.reason), failure.another_may_work
        if output.stage_exit is not None:
            return self._log_end(output.stage_exit.reason, output.stage_exit), False
        reason = self._write_error or output.error or explain_lost_connection(self.location, exit_code)
        return self._log_end(reason), False

    def _read_output(self, stream: IO[bytes]) -> _Output:
        """Read to the end of the stream, and post the messages."""
        output = _Output()
        with stream:
            try:
                self._log_shell_output(skip_to_mark(stream))
                self._send_early_messages()
                while (frame := read_frame(stream)) is not None:
                    self.received_at = time.monotonic()
                    output.stage_exit = self._on_frame(frame)
            except (ProtocolError, OSError) as error:
                output.error = str(error)
        return output

    def _send_early_messages(self) -> None:
        with self._lock:
            assert self._writer is not None and self._early_messages is not None
            for payload in self._early_messages:
                self._writer.put(Kind.MESSAGE, payload)
            self.received_at = time.monotonic()
            self._early_messages = None

    def _on_frame(self, frame: Frame) -> StageExit | None:
        """Handle one frame of the guard; return its payload if it is the guard's last one."""
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

    def _log_end(self, reason: str, stage_exit: StageExit | None = None) -> StageEnded:
        """Log and return the end. Without ``stage_exit`` the stage's last status may be outdated."""
        exit_code, number = (None, None) if stage_exit is None else (stage_exit.exit_code, stage_exit.signal)
        status = None
        if self.has_started:
            status = f"last status: {self.status.update}" if stage_exit is None else str(self.status.update)
        tail = tuple(self._stderr_tail)
        end = StageEnded(self.rank, self.location.host, self.has_started, reason, exit_code, number, status, tail)
        self._log(f"{self._prefix} {end.description}")
        return end
