"""Frames on a byte stream, and the threads that read and write them. Standard library only: the guard runs it.

A stream from a stage opens with ``MARK``; what a login shell prints before it is skipped. Every frame after it is
``<length: uint32 little-endian><kind: uint8><payload>``; anything else is a ProtocolError.
"""

import enum
import queue
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import IO, NamedTuple

from mlx_k2.errors import ProtocolError

MARK = b"mlx-k2 control 2"
MAX_CHATTER_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024
QUEUE_FRAMES = 4096

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


class FrameWriter:
    """Writes frames to ``stream`` from a thread of its own, in the order of ``put``."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream = stream
        self._name = name
        # A SimpleQueue, and no lock of Python's: a signal handler that raises in the midst of those leaves them held.
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name=f"write {name}", daemon=True)
        self._thread.start()

    def put(self, kind: Kind, payload: bytes) -> None:
        """Queue one frame; after ``close``, or when the peer is gone, it is dropped (the reader reports that end).

        Raises:
            ProtocolError: the peer has not read for so long that the queue is full.
        """
        self._put(encode_frame(kind, payload))

    def put_raw(self, data: bytes) -> None:
        """Queue bytes that are not a frame: the opening mark."""
        self._put(data)

    def close(self, timeout_s: float) -> None:
        """Close the stream once what is queued is written; waits for that for at most ``timeout_s``.

        After that it still happens in the background, as soon as the peer reads or goes.
        """
        self._is_open = False
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _put(self, data: bytes) -> None:
        if not self._is_open:
            return
        if self._queue.qsize() >= QUEUE_FRAMES:
            raise ProtocolError(f"{self._name} has stopped reading: {QUEUE_FRAMES} frames are waiting for it")
        self._queue.put(data)

    def _run(self) -> None:
        try:
            while (data := self._queue.get()) is not None:
                self._stream.write(data)
                if self._queue.empty():
                    self._stream.flush()
        except (OSError, ValueError):  # the peer is gone, or the stream was closed under us
            self._is_open = False
        with suppress(OSError, ValueError):
            self._stream.close()  # also where a write failed, so that no descriptor stays open


class FrameReader:
    """Reads frames from ``stream`` on a thread of its own and hands each to ``on_frame``, which may refuse one.

    ``on_end`` is called once, last: with None at a clean end of the stream, else with what was wrong: the stream
    broke, or ``on_frame`` raised a ProtocolError. Both are called on the reading thread and must not block.
    """

    def __init__(
        self,
        stream: IO[bytes],
        name: str,
        on_frame: Callable[[Frame], None],
        on_end: Callable[[ProtocolError | None], None],
    ) -> None:
        self._stream = stream
        self._on_frame = on_frame
        self._on_end = on_end
        self._thread = threading.Thread(target=self._run, name=f"read {name}", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait until the stream has ended, at most ``timeout_s``."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        end: ProtocolError | None = ProtocolError("the control connection's reader failed")
        try:
            while (frame := read_frame(self._stream)) is not None:
                self._on_frame(frame)
            end = None
        except ProtocolError as error:
            end = error
        except (OSError, ValueError) as error:
            end = ProtocolError(f"the control connection broke: {error}")
        finally:  # also where on_frame has a fault of its own: whoever waits must hear of it
            self._on_end(end)
