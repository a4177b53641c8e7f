"""What a coordinator hears of a stage: what it said, and its end. Starts and reads nothing."""

from dataclasses import dataclass

from mlx_k2.control.messages import FromStage
from mlx_k2.errors import ClusterError, StageFault, StageStartError


@dataclass(frozen=True)
class StageMessage:
    """A stage said something."""

    rank: int
    message: FromStage


@dataclass(frozen=True)
class StageEnded:
    """A stage's process or the connection to it has ended; nothing more comes from it.

    ``exit_code`` or ``signal`` is the stage's own where its guard could still report it. ``came_up`` is False when
    its guard never spoke: then ``reason`` says what to do about it.
    """

    rank: int
    host: str
    came_up: bool
    reason: str
    exit_code: int | None = None
    signal: int | None = None
    stderr_tail: tuple[str, ...] = ()

    def as_error(self) -> ClusterError:
        """The end as an error for the user."""
        if not self.came_up:
            return StageStartError(f"stage {self.rank} on {self.host} did not start: {self.reason}")
        how = ""
        if self.signal is not None:
            how = f" with signal {self.signal}"
        elif self.exit_code is not None:
            how = f" with exit code {self.exit_code}"
        last_words = f" (it wrote last: {self.stderr_tail[-1]})" if self.stderr_tail else ""
        return StageFault(f"stage {self.rank} on {self.host} ended{how}: {self.reason}{last_words}")


StageEvent = StageMessage | StageEnded
