"""Frames on a byte stream: an opening mark, then length, kind and payload. Standard library only: the guard runs it.

A stream from a stage opens with ``MARK``; what a login shell prints before it is skipped. Every frame after it is
``<length: uint32 little-endian><kind: uint8><payload>``; anything else is a ProtocolError.
"""

import enum
import struct
from typing import IO, NamedTuple

from mlx_k2.errors import ProtocolError

MARK = b"mlx-k2 control 2"
MAX_CHATTER_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024

_HEADER = struct.Struct("<IB")


class Kind(enum.IntEnum):
    """Who a frame is for, so that the guard can relay what it does not understand."""

    MESSAGE = 1
    """Between coordinator and stage; msgpack (protocol/messages.py). The guard passes it on unread."""
    GUARD_SETTINGS = 2
    """Coordinator to guard: JSON, GuardSettings."""
    HEARTBEAT = 3
    """Coordinator to guard, answered by the same payload."""
    STAGE_EXIT = 4
    """Guard to coordinator, its last frame: JSON {"exit_code": int | null, "signal": int | null, "reason": str}."""
    STAGE_STATUS = 5
    """Where the stage stands: JSON. Stage to guard: PhaseUpdate; guard to coordinator, each heartbeat: Standing."""


class Frame(NamedTuple):
    """One frame as it was read."""

    kind: Kind
    payload: bytes


def encode_frame(kind: Kind, payload: bytes) -> bytes:
    """The bytes of one frame."""
    assert len(payload) <= MAX_PAYLOAD_BYTES, f"a {kind.name} frame of {len(payload)} bytes"
    return _HEADER.pack(len(payload), kind) + payload


def read_frame(stream: IO[bytes]) -> Frame | None:
    """The next frame, or None when the stream ends between two frames.

    Raises:
        ProtocolError: the stream ends inside a frame, or holds something that is not one.
    """
    header = _read_exactly(stream, _HEADER.size)
    if not header:
        return None
    if len(header) < _HEADER.size:
        raise ProtocolError("the control connection ended in the middle of a frame")
    length, code = _HEADER.unpack(header)
    if length > MAX_PAYLOAD_BYTES or code not in Kind.__members__.values():
        raise ProtocolError(f"the control connection carries something else than frames: {header!r}")
    payload = _read_exactly(stream, length)
    if len(payload) < length:
        raise ProtocolError("the control connection ended in the middle of a frame")
    return Frame(Kind(code), payload)


def skip_to_mark(stream: IO[bytes]) -> bytes:
    """Read up to and including the opening mark; what came before it is returned.

    Raises:
        ProtocolError: the stream ended, or 64 KB passed, without the mark; the message quotes the last of it.
    """
    seen = bytearray()
    while not seen.endswith(MARK):
        byte = stream.read(1)
        if not byte or len(seen) >= MAX_CHATTER_BYTES + len(MARK):
            ending = "ended" if not byte else f"sent {MAX_CHATTER_BYTES // 1024} KB"
            tail = seen[-400:].decode(errors="replace").strip()
            raise ProtocolError(f"the stage's output {ending} without its opening mark" + (f": {tail}" if tail else ""))
        seen += byte
    return bytes(seen[: -len(MARK)])


def _read_exactly(stream: IO[bytes], count: int) -> bytes:
    """``count`` bytes, fewer only at the end of the stream (an unbuffered pipe may return short reads)."""
    parts = []
    while count:
        part = stream.read(count)
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
