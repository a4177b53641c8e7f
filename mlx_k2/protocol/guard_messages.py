"""The JSON payloads of the guard's frames, and the time that a stage has to end. Standard library only.

The guard (guard/guard.py) reports the stage's status, because the stage cannot while mlx.distributed.init holds the
GIL.
"""

import enum
from dataclasses import dataclass

from mlx_k2.protocol.framing import JsonPayload

TERMINATE_AFTER_S = 1.0  # time from the end of a stage's input, which asks it to end, to SIGTERM

ENDED_BY_ITSELF = "it ended by itself"  # ``StageExit.reason`` if the guard did not end the stage

_KILL_AFTER_S = 5.0
_HELD_BYTES_PER_SECOND = 10e9


def kill_after_s(held_bytes: int) -> float:
    """Return the time from the end of a stage's input to SIGKILL: 5 s, plus 1 s for each 10 GB that it holds.

    A hard kill can leave memory wired on macOS, so SIGKILL is sent last.
    """
    return _KILL_AFTER_S + held_bytes / _HELD_BYTES_PER_SECOND


@dataclass(frozen=True)
class GuardSettings(JsonPayload):
    """Payload of GUARD_SETTINGS. The guard ends the stage after ``lease_s`` without a frame from the coordinator.

    ``held_bytes`` is the memory that the stage holds; it determines ``kill_after_s``. ``environment`` has the lines
    ``NAME=value`` with which the guard starts the stage; it counts in the first settings only.
    """

    lease_s: float = 20.0
    held_bytes: int = 0
    environment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values of other types or out of range."""
        object.__setattr__(self, "environment", tuple(self.environment))  # JSON has a list
        if not self.lease_s > 0 or not isinstance(self.held_bytes, int) or self.held_bytes < 0:
            raise ValueError("guard settings out of range")
        if not all(isinstance(line, str) and "=" in line for line in self.environment):
            raise ValueError("the environment is not a list of NAME=value lines")


@dataclass(frozen=True)
class StageExit(JsonPayload):
    """Payload of STAGE_EXIT: how the stage's process ended, and why the guard ended it, or ENDED_BY_ITSELF.

    One of ``exit_code`` and ``signal`` is set, or neither if the process could not be killed.
    """

    exit_code: int | None
    signal: int | None
    reason: str

    def __post_init__(self) -> None:
        """Refuse values of other types."""
        if not all(isinstance(number, int | None) for number in (self.exit_code, self.signal)):
            raise TypeError("an exit code or a signal is not a number")
        if not isinstance(self.reason, str):
            raise TypeError("the reason is not text")

    @classmethod
    def from_returncode(cls, returncode: int | None, reason: str) -> "StageExit":
        """Convert a ``returncode`` of subprocess, which is -N for signal N and None for a running process."""
        if returncode is not None and returncode < 0:
            return cls(exit_code=None, signal=-returncode, reason=reason)
        return cls(exit_code=returncode, signal=None, reason=reason)


class Phase(enum.StrEnum):
    """The activity of a stage. In a step a stage receives, computes and sends."""

    STARTING = "starting"
    IDLE = "waiting for the next step"
    READING = "reading the model's small files"
    DOWNLOADING = "downloading"
    PROBING = "probing its host"
    MEASURING = "measuring its hops"
    CONNECTING = "connecting to its neighbours"
    LOADING = "loading"
    RECEIVING = "receiving hidden states"
    COMPUTING = "computing the layers"
    SENDING = "sending hidden states"


@dataclass(frozen=True)
class PhaseUpdate(JsonPayload):
    """The start of a stage's phase. The guard ends a stage whose phase lasts longer than ``limit_s`` (None: no limit).

    ``step`` is the number of the step that the stage works on; while it is idle, of the last step that it finished.
    """

    phase: Phase
    step: int | None = None
    limit_s: float | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        object.__setattr__(self, "phase", Phase(self.phase))  # JSON has text
        if not all(number is None or number >= 0 for number in (self.step, self.limit_s)):
            raise ValueError("a step or a limit is below 0")

    def __str__(self) -> str:
        if self.step is None:
            return str(self.phase)
        return f"{self.phase} {'after' if self.phase is Phase.IDLE else 'of'} step {self.step}"


@dataclass(frozen=True)
class StageStatus(JsonPayload):
    """A stage's last PhaseUpdate, and the seconds ``for_s`` since it arrived, without those in which the host slept.

    ``stopped_s`` is the time for which the stage's process has been suspended (SIGSTOP); 0 while it runs.
    """

    update: PhaseUpdate
    for_s: float
    stopped_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values of other types."""
        if not isinstance(self.update, PhaseUpdate):  # JSON has an object
            object.__setattr__(self, "update", PhaseUpdate(**self.update))
        if not all(isinstance(seconds, int | float) for seconds in (self.for_s, self.stopped_s)):
            raise TypeError("a time is not a number")
