"""Where a stage stands: what it announces to its guard, and what the guard tells the coordinator.

Standard library only: a guard answers for a stage that cannot, since mlx.distributed.init holds the GIL.
"""

import enum
import json
from dataclasses import asdict, dataclass

from mlx_k2.errors import ProtocolError


class Phase(enum.StrEnum):
    """What a stage is doing; in a step it receives, computes and sends."""

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
    """A stage enters ``phase``; its guard ends it when that lasts longer than ``limit_s`` (None: it may).

    ``step`` is the step that it works on; while it is idle, the last one that it finished.
    """

    phase: Phase
    step: int | None = None
    limit_s: float | None = None

    def __str__(self) -> str:
        if self.step is None:
            return str(self.phase)
        return f"{self.phase} {'after' if self.phase is Phase.IDLE else 'of'} step {self.step}"

    def to_json(self) -> bytes:
        """The payload of a stage's STANDING frame."""
        return json.dumps({"phase": self.phase, "step": self.step, "limit_s": self.limit_s}).encode()

    @classmethod
    def from_json(cls, payload: bytes) -> "PhaseUpdate":
        """What a stage wrote.

        Raises:
            ProtocolError: the payload is not that.
        """
        try:
            values = json.loads(payload)
            return cls(Phase(values["phase"]), _count(values["step"]), _seconds(values["limit_s"]))
        except (ValueError, KeyError, TypeError):
            raise ProtocolError(f"not an PhaseUpdate: {payload[:200]!r}") from None


@dataclass(frozen=True)
class StageStatus:
    """Where a stage stands, and since how many seconds by its guard's count; ``stopped_s``: its process is stopped."""

    update: PhaseUpdate
    for_s: float
    stopped_s: float = 0.0

    def to_json(self) -> bytes:
        """The payload of a guard's STANDING frame."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, payload: bytes) -> "StageStatus":
        """What a guard wrote.

        Raises:
            ProtocolError: the payload is not that.
        """
        try:
            values = json.loads(payload)
            update = PhaseUpdate.from_json(json.dumps(values["update"]).encode())
            return cls(update, float(values["for_s"]), float(values["stopped_s"]))
        except (ValueError, KeyError, TypeError, OverflowError):
            raise ProtocolError(f"not a Standing: {payload[:200]!r}") from None


def _seconds(value: object) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError(value)


def _count(value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError(value)
