"""The phase of a stage: the update that it sends to its guard, and the status that the guard sends to the coordinator.

Standard library only: the guard reports the status, because the stage cannot while mlx.distributed.init holds the GIL.
"""

import enum
from dataclasses import dataclass

from mlx_k2.protocol.framing import JsonPayload


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
    """The start of a stage's ``phase``. Its guard ends it if the phase lasts longer than ``limit_s`` (None: no limit).

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
    """A stage's last PhaseUpdate, and the seconds since it arrived, as its guard counts them.

    ``stopped_s`` is the time for which the stage's process has been stopped; 0 while it runs.
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
