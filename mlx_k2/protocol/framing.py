"""Frames on a byte stream, and the threads that read and write them. Standard library only: the guard imports it.

A stream from a stage starts with ``MARK``; bytes that a login shell prints before it are skipped. The mark is a line
that ends with the version of mlx-k2; its form is the same in all versions. After it come frames
``<length: uint32 little-endian><kind: uint8><payload>``; anything else raises ProtocolError.
"""

import enum
import json
import queue
import re
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import IO, NamedTuple, Self

from mlx_k2 import __version__
from mlx_k2.errors import ProtocolError
from mlx_k2.json_text.parse import parse_json

MARK_START = b"mlx-k2 control "
MARK = MARK_START + __version__.encode() + b"\n"
MAX_VERSION_BYTES = 64
MAX_SHELL_OUTPUT_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024
MAX_QUEUED_FRAMES = 4096

_HEADER = struct.Struct("<IB")
_VERSION_LINE = re.compile(rb"[0-9][0-9A-Za-z.+!-]*\n")


class Kind(enum.IntEnum):
    """The sender, receiver and payload type of a frame."""

    MESSAGE = 1
    """Between coordinator and stage: msgpack (protocol/messages.py). The guard relays the payload unread."""
    GUARD_SETTINGS = 2
    """Coordinator to guard: JSON, GuardSettings."""
    HEARTBEAT = 3
    """Coordinator to guard. The guard answers with the same payload."""
    STAGE_EXIT = 4
    """Guard to coordinator, its last frame: JSON, StageExit."""
    STAGE_STATUS = 5
    """JSON. Stage to guard: PhaseUpdate. Guard to coordinator, before the answer to a heartbeat: StageStatus."""


class Frame(NamedTuple):
    """One frame read from a stream."""

    kind: Kind
    payload: bytes


@dataclass(frozen=True)
class JsonPayload:
    """Base of the JSON payloads of frames. A subclass checks its values in ``__post_init__``."""

    def to_json(self) -> bytes:
        """Encode the payload as a JSON object with the fields of the dataclass."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, payload: bytes) -> Self:
        """Decode a payload.

        Raises:
            ProtocolError: the payload is no object with exactly the dataclass's fields, or a value is not allowed.
        """
        try:
            values = parse_json(payload)
            if values.keys() == {field.name for field in fields(cls)}:
                return cls(**values)
        except (ValueError, TypeError, AttributeError, OverflowError):
            pass
        raise ProtocolError(f"not a {cls.__name__}: {payload[:200]!r}")


def encode_frame(kind: Kind, payload: bytes) -> bytes:
    """Return the bytes of one frame."""
    assert len(payload) <= MAX_PAYLOAD_BYTES, f"a {kind.name} frame of {len(payload)} bytes"
    return _HEADER.pack(len(payload), kind) + payload


def read_frame(stream: IO[bytes]) -> Frame | None:
    """Read the next frame; return None if the stream ends between two frames.

    Raises:
        ProtocolError: the stream ends inside a frame, or holds bytes that are not a frame.
    """
    header = _read_exactly(stream, _HEADER.size)
    if not header:
        return None
    if len(header) < _HEADER.size:
        raise ProtocolError("the control connection ended in the middle of a frame")
    length, code = _HEADER.unpack(header)
    if length > MAX_PAYLOAD_BYTES or code not in Kind.__members__.values():
        raise ProtocolError(f"the control connection carries bytes that are not frames: {header!r}")
    payload = _read_exactly(stream, length)
    if len(payload) < length:
        raise ProtocolError("the control connection ended in the middle of a frame")
    return Frame(Kind(code), payload)


def skip_to_mark(stream: IO[bytes]) -> bytes:
    """Read up to and including the opening mark; return the bytes before it.

    Raises:
        ProtocolError: the stream ended, or MAX_SHELL_OUTPUT_BYTES were read, without the mark; quotes the last 400
            bytes. Or the mark has another version of mlx-k2; names both.
    """
    output = bytearray()
    while not output.endswith(MARK_START):
        byte = stream.read(1)
        if not byte or len(output) >= MAX_SHELL_OUTPUT_BYTES + len(MARK_START):
            ending = f"sent {MAX_SHELL_OUTPUT_BYTES // 1024} KB" if byte else "ended"
            tail = output[-400:].decode(errors="replace").strip()
            raise ProtocolError(f"the stage's output {ending} without its opening mark" + (f": {tail}" if tail else ""))
        output += byte
    line = stream.readline(MAX_VERSION_BYTES)
    if MARK_START + line != MARK:
        version = line.decode().strip() if _VERSION_LINE.fullmatch(line) else "of another version"
        raise ProtocolError(
            f"its mlx-k2 is {version}, and that of this machine is {__version__}: install the same on both, from one "
            "wheel (make dist)"
        )
    return bytes(output[: -len(MARK_START)])


def _read_exactly(stream: IO[bytes], count: int) -> bytes:
    """Read ``count`` bytes, or fewer at the end of the stream. One read of an unbuffered pipe may return fewer."""
    parts = []
    while count:
        part = stream.read(count)
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


class FrameWriter:
    """A thread that writes frames to ``stream`` in the order of the calls of ``put``. ``name`` is the peer's."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream = stream
        self._name = name
        # SimpleQueue uses no Python-level lock: a signal handler that raises inside such a lock's code leaves it held.
        self._queue: queue.SimpleQueue[bytes | threading.Event | None] = queue.SimpleQueue()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name=f"write {name}", daemon=True)
        self._thread.start()

    def put(self, kind: Kind, payload: bytes) -> None:
        """Queue one frame. Drop it after ``close``, or once a write has failed: FrameReader reports the peer's end.

        Raises:
            ProtocolError: the queue is full, because the peer has stopped reading.
        """
        self.put_raw(encode_frame(kind, payload))

    def put_raw(self, data: bytes) -> None:
        """Queue ``data`` as it is: a whole frame, or the opening mark. Drop it or raise as ``put`` does."""
        if not self._is_open:
            return
        if self._queue.qsize() >= MAX_QUEUED_FRAMES:
            raise ProtocolError(f"{self._name} has stopped reading: {MAX_QUEUED_FRAMES} frames are waiting for it")
        self._queue.put(data)

    def flush(self, timeout_s: float) -> None:
        """Wait at most ``timeout_s`` until all queued bytes are written."""
        is_written = threading.Event()
        self._queue.put(is_written)
        is_written.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Close the stream once all queued bytes are written. Wait at most ``timeout_s``.

        The thread goes on after ``timeout_s``, until the peer has read the rest or closed its end.
        """
        self._is_open = False
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while (entry := self._queue.get()) is not None:
                if isinstance(entry, threading.Event):
                    self._stream.flush()
                    entry.set()
                    continue
                self._stream.write(entry)
                if self._queue.empty():
                    self._stream.flush()
        except (OSError, ValueError):  # the peer has closed its end, or other code has closed the stream
            self._is_open = False
        with suppress(OSError, ValueError):
            self._stream.close()  # also after a failed write, so that no descriptor stays open


class FrameReader:
    """A thread that reads frames from ``stream`` and passes each to ``on_frame``, which may raise ProtocolError.

    ``name`` is the peer's. ``on_end`` is called once, last: with None if the stream ended between two frames, else with
    the error of the stream or of ``on_frame``. Both are called on the reading thread and must not block.
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
        """Wait at most ``timeout_s`` for the end of the stream."""
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
        finally:  # an unexpected exception in on_frame is reported, too, as the error above
            self._on_end(end)
