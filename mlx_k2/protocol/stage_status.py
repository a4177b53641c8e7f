"""The phase of a stage: the update that it sends to its guard, and the status that the guard sends to the coordinator.

Standard library only: the guard reports the status, because the stage cannot while mlx.distributed.init holds the GIL.
"""

import enum
import json
from dataclasses import asdict, dataclass

from mlx_k2.errors import ProtocolError
from mlx_k2.json_text.parse import parse_json


class Phase(enum.StrEnum):
    """The activity of a stage. In a step a stage receives, computes and sends."""

    STARTING = "starting"
    IDLE = "waiting for a plan"
    READING = "reading the model's small files"
    DOWNLOADING = "downloading"
    PROBING = "looking at its host"
    MEASURING = "measuring its hops"
    CONNECTING = "connecting to its neighbours"
    LOADING = "loading"
    RECEIVING = "receiving hidden states"
    COMPUTING = "computing the layers"
    SENDING = "sending hidden states"


@dataclass(frozen=True)
class PhaseUpdate:
    """The start of a stage's ``phase``. Its guard ends it if the phase lasts longer than ``limit_s`` (None: no limit).

    ``step`` is the number of the step that the stage works on; while it is idle, of the last step that it finished.
    """

    phase: Phase
    step: int | None = None
    limit_s: float | None = None

    def __str__(self) -> str:
        if self.step is None:
            return str(self.phase)
        return f"{self.phase} {'after' if self.phase is Phase.IDLE else 'of'} step {self.step}"

    def to_json(self) -> bytes:
        """Encode the payload of a STAGE_STATUS frame from stage to guard."""
        return json.dumps({"phase": self.phase, "step": self.step, "limit_s": self.limit_s}).encode()

    @classmethod
    def from_json(cls, payload: bytes) -> "PhaseUpdate":
        """Decode a payload that a stage wrote.

        Raises:
            ProtocolError: the payload is not a PhaseUpdate object.
        """
        try:
            values = parse_json(payload)
            return cls(Phase(values["phase"]), _count(values["step"]), _seconds(values["limit_s"]))
        except (ValueError, KeyError, TypeError):
            raise ProtocolError(f"not a PhaseUpdate: {payload[:200]!r}") from None


@dataclass(frozen=True)
class StageStatus:
    """A stage's last PhaseUpdate, and for how many seconds it has held, as its guard counts.

    ``stopped_s`` is for how many seconds the stage's process has been stopped; 0 while it runs.
    """

    update: PhaseUpdate
    for_s: float
    stopped_s: float = 0.0

    def to_json(self) -> bytes:
        """Encode the payload of a STAGE_STATUS frame from guard to coordinator."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, payload: bytes) -> "StageStatus":
        """Decode a payload that a guard wrote.

        Raises:
            ProtocolError: the payload is not a StageStatus object.
        """
        try:
            values = parse_json(payload)
            update = PhaseUpdate.from_json(json.dumps(values["update"]).encode())
            return cls(update, float(values["for_s"]), float(values["stopped_s"]))
        except (ValueError, KeyError, TypeError, OverflowError):
            raise ProtocolError(f"not a StageStatus: {payload[:200]!r}") from None


def _seconds(value: object) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError(value)


def _count(value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError(value)
