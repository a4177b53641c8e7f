"""The events of a stage that the coordinator receives: its messages and its end. Starts and reads nothing."""

from dataclasses import dataclass
from signal import SIGKILL

from mlx_k2.errors import ClusterError, StageFault, StageStartError
from mlx_k2.protocol.guard_messages import ENDED_BY_ITSELF
from mlx_k2.protocol.messages import FromStage


@dataclass(frozen=True)
class Woken:
    """End of a wait without a message: ``StageGroup.wake`` was called, or the given time has come."""


@dataclass(frozen=True)
class StageMessage:
    """A message from a stage."""

    rank: int
    message: FromStage


@dataclass(frozen=True)
class StageEnded:
    """The end of a stage's process or of the connection to it; the stage's last event.

    ``exit_code`` or ``signal`` is the stage's own, if the guard could still report it. ``has_started`` is False if the
    guard never sent its opening mark; then ``reason`` includes the fix. ``status`` is the stage's last phase and step.
    """

    rank: int
    host: str
    has_started: bool
    reason: str
    exit_code: int | None = None
    signal: int | None = None
    status: str | None = None
    stderr_tail: tuple[str, ...] = ()

    def as_error(self) -> ClusterError:
        """Return the end as an error for the user."""
        if not self.has_started:
            return StageStartError(f"stage {self.rank} on {self.host} did not start: {self.reason}", self.rank)
        status = f" ({self.status})" if self.status else ""
        last_line = f" (it wrote last: {self.stderr_tail[-1]})" if self.stderr_tail else ""
        return StageFault(f"stage {self.rank} on {self.host}{status} {self.description}{last_line}", self.rank)

    @property
    def description(self) -> str:
        """The exit code or signal and the reason, in words that follow the stage's name."""
        if self.signal == SIGKILL and self.reason == ENDED_BY_ITSELF:
            return f"ended with signal {SIGKILL}: it was killed, possibly by the out-of-memory killer"
        if self.signal is not None:
            return f"ended with signal {self.signal}: {self.reason}"
        if self.exit_code is not None:
            return f"ended with exit code {self.exit_code}: {self.reason}"
        return f"ended: {self.reason}"


StageEvent = StageMessage | StageEnded | Woken
