"""The messages between coordinator and guard, and the time that a stage has to end. Standard library only.

The guard itself is guard/guard.py. The payload of its STAGE_STATUS frames is in protocol/stage_status.py.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from mlx_k2.errors import ProtocolError
from mlx_k2.json_text.parse import JsonError, parse_json

POLITE_S = 1.0
"""Time from the end of a stage's input to SIGTERM."""

ENDED_BY_ITSELF = "it ended by itself"
"""``StageExit.reason`` if the guard had no reason to end the stage."""

_KILL_AFTER_S = 5.0
_HELD_BYTES_PER_SECOND = 10e9


def kill_after_s(held_bytes: int) -> float:
    """Return the time from the end of a stage's input to SIGKILL: 5 s, plus 1 s for each 10 GB that it holds.

    A hard kill can leave memory wired on macOS, so SIGKILL is the last resort.
    """
    return _KILL_AFTER_S + held_bytes / _HELD_BYTES_PER_SECOND


@dataclass(frozen=True)
class GuardSettings:
    """Payload of GUARD_SETTINGS. The guard ends the stage after ``lease_s`` without a frame from the coordinator.

    ``held_bytes`` is the memory that the stage holds; it determines ``kill_after_s``. ``environment`` are lines
    ``NAME=value`` of the first settings. The guard starts the stage with them: MLX reads some when it is imported.
    """

    lease_s: float = 20.0
    held_bytes: int = 0
    environment: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """Encode the payload."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, payload: bytes) -> "GuardSettings":
        """Decode a payload that the coordinator sent.

        Raises:
            ProtocolError: the payload is not a GuardSettings object, or a value is out of range.
        """
        values = _object(payload, cls)
        lease_s, held_bytes, lines = values["lease_s"], values["held_bytes"], values["environment"]
        if not isinstance(lease_s, int | float) or not lease_s > 0 or not isinstance(held_bytes, int) or held_bytes < 0:
            raise ProtocolError(f"guard settings out of range: {payload!r}")
        if not isinstance(lines, list) or not all(isinstance(line, str) and "=" in line for line in lines):
            raise ProtocolError("the environment in the guard settings is not a list of NAME=value lines")
        return cls(lease_s=float(lease_s), held_bytes=held_bytes, environment=tuple(lines))


@dataclass(frozen=True)
class StageExit:
    """Payload of STAGE_EXIT: how the stage's process ended, and why the guard ended it (else ENDED_BY_ITSELF).

    One of ``exit_code`` and ``signal`` is set, or neither if the process could not be ended at all.
    """

    exit_code: int | None
    signal: int | None
    reason: str

    @classmethod
    def from_returncode(cls, returncode: int | None, reason: str) -> "StageExit":
        """Convert the returncode of subprocess, which is negative for a signal and None for a running process."""
        ended_by_signal = returncode is not None and returncode < 0
        return cls(
            exit_code=None if ended_by_signal else returncode,
            signal=-returncode if returncode is not None and ended_by_signal else None,
            reason=reason,
        )

    def to_json(self) -> bytes:
        """Encode the payload."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, payload: bytes) -> "StageExit":
        """Decode a payload that a guard sent.

        Raises:
            ProtocolError: the payload is not a StageExit object, or a value has the wrong type.
        """
        values = _object(payload, cls)
        numbers = (values["exit_code"], values["signal"])
        if not all(number is None or isinstance(number, int) for number in numbers):
            raise ProtocolError(f"a stage's exit is out of range: {payload!r}")
        return cls(exit_code=numbers[0], signal=numbers[1], reason=str(values["reason"]))


def _object(payload: bytes, cls: type[GuardSettings] | type[StageExit]) -> dict[str, Any]:
    """Decode the JSON object in ``payload``, which must have exactly the fields of ``cls``."""
    try:
        values = parse_json(payload)
    except JsonError as error:
        raise ProtocolError(f"not a {cls.__name__}: {error}") from None
    names = {field.name for field in fields(cls)}
    if not isinstance(values, dict) or values.keys() != names:
        raise ProtocolError(f"not a {cls.__name__}: {payload!r}")
    return values
