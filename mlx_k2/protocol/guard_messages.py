"""What the coordinator and a guard tell each other, and how long a stage may take to end. Standard library only.

The guard itself is guard/guard.py; the two JSON payloads here are its whole language.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from mlx_k2.errors import ProtocolError

POLITE_S = 1.0
"""From the end of its input to SIGTERM."""

ENDED_BY_ITSELF = "it ended by itself"
"""A StageExit's reason where the guard had none to end the stage."""

_KILL_AFTER_S = 5.0
_HELD_BYTES_PER_SECOND = 10e9


def kill_after_s(held_bytes: int) -> float:
    """From the end of a stage's input to SIGKILL: a hard kill can leave memory wired on macOS, so it waits longest."""
    return _KILL_AFTER_S + held_bytes / _HELD_BYTES_PER_SECOND


@dataclass(frozen=True)
class GuardSettings:
    """Payload of GUARD_SETTINGS. The guard ends the stage when nothing has come for ``lease_s``."""

    lease_s: float = 20.0
    held_bytes: int = 0

    def to_json(self) -> bytes:
        """The payload."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, payload: bytes) -> "GuardSettings":
        """What the coordinator sent.

        Raises:
            ProtocolError: the payload is not that.
        """
        values = _object(payload, cls)
        lease_s, held_bytes = values["lease_s"], values["held_bytes"]
        if not isinstance(lease_s, int | float) or not lease_s > 0 or not isinstance(held_bytes, int) or held_bytes < 0:
            raise ProtocolError(f"guard settings out of range: {payload!r}")
        return cls(lease_s=float(lease_s), held_bytes=held_bytes)


@dataclass(frozen=True)
class StageExit:
    """Payload of STAGE_EXIT: how the stage's process ended, and why the guard ended it if it did.

    One of ``exit_code`` and ``signal`` is set, or neither when the process could not be ended at all.
    """

    exit_code: int | None
    signal: int | None
    reason: str

    @classmethod
    def from_returncode(cls, returncode: int | None, reason: str) -> "StageExit":
        """From subprocess's number, which is negative for a signal."""
        ended_by_signal = returncode is not None and returncode < 0
        return cls(
            exit_code=None if ended_by_signal else returncode,
            signal=-returncode if returncode is not None and ended_by_signal else None,
            reason=reason,
        )

    def to_json(self) -> bytes:
        """The payload."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, payload: bytes) -> "StageExit":
        """What a guard sent.

        Raises:
            ProtocolError: the payload is not that.
        """
        values = _object(payload, cls)
        numbers = (values["exit_code"], values["signal"])
        if not all(number is None or isinstance(number, int) for number in numbers):
            raise ProtocolError(f"a stage's exit is out of range: {payload!r}")
        return cls(exit_code=numbers[0], signal=numbers[1], reason=str(values["reason"]))


def _object(payload: bytes, cls: type[GuardSettings] | type[StageExit]) -> dict[str, Any]:
    """The JSON object in ``payload``, with exactly the fields of ``cls``."""
    try:
        values = json.loads(payload)
    except ValueError as error:
        raise ProtocolError(f"not a {cls.__name__}: {error}") from None
    names = {field.name for field in fields(cls)}
    if not isinstance(values, dict) or values.keys() != names:
        raise ProtocolError(f"not a {cls.__name__}: {payload!r}")
    return values
