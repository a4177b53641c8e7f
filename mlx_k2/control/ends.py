"""The two ends of a pipe: one thread that always reads, one that writes from a bounded queue. Standard library only.

Nobody who computes does I/O here: ``FrameWriter.put`` never waits, and a full queue is a fault with a name.
"""

import queue
import threading
from collections.abc import Callable
from typing import BinaryIO

from mlx_k2.control.framing import Frame, Kind, encode_frame, read_frame
from mlx_k2.errors import ProtocolError

QUEUE_FRAMES = 4096


class FrameWriter:
    """Writes frames to ``stream`` from a thread of its own, in the order of ``put``."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._queue: queue.Queue[bytes | None] = queue.Queue(QUEUE_FRAMES)
        self._broken = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"write {name}", daemon=True)
        self._thread.start()

    def put(self, kind: Kind, payload: bytes) -> None:
        """Queue one frame; frames for a peer that is gone are dropped (its reader reports the end).

        Raises:
            ProtocolError: the peer has not read for so long that the queue is full.
        """
        self._put(encode_frame(kind, payload))

    def put_raw(self, data: bytes) -> None:
        """Queue bytes that are not a frame: the opening mark."""
        self._put(data)

    def close(self, timeout_s: float) -> None:
        """Write what is queued, then close the stream; gives up after ``timeout_s``."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _put(self, data: bytes) -> None:
        if self._broken.is_set():
            return
        try:
            self._queue.put_nowait(data)
        except queue.Full:
            raise ProtocolError(f"{self._name} has stopped reading: {QUEUE_FRAMES} frames are waiting for it") from None

    def _run(self) -> None:
        try:
            while (data := self._queue.get()) is not None:
                self._stream.write(data)
                if self._queue.empty():
                    self._stream.flush()
            self._stream.close()
        except (OSError, ValueError):  # the peer is gone, or the stream was closed under us
            self._broken.set()


class FrameReader:
    """Reads frames from ``stream`` on a thread of its own and hands each to ``on_frame``.

    ``on_end`` is called once, last: with None at a clean end of the stream, else with what was wrong. Both are called
    on the reading thread and must not block.
    """

    def __init__(
        self,
        stream: BinaryIO,
        name: str,
        on_frame: Callable[[Frame], None],
        on_end: Callable[[ProtocolError | None], None],
        before: Callable[[BinaryIO], None] | None = None,
    ) -> None:
        self._stream = stream
        self._on_frame = on_frame
        self._on_end = on_end
        self._before = before
        self._thread = threading.Thread(target=self._run, name=f"read {name}", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait until the stream has ended, at most ``timeout_s``."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            if self._before is not None:
                self._before(self._stream)
            while (frame := read_frame(self._stream)) is not None:
                self._on_frame(frame)
        except ProtocolError as error:
            self._on_end(error)
        except (OSError, ValueError) as error:
            self._on_end(ProtocolError(f"the control connection broke: {error}"))
        else:
            self._on_end(None)
