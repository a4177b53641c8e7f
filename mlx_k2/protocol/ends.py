"""The two ends of a pipe: one thread that always reads, one that writes from a bounded queue. Standard library only.

Nobody who computes does I/O here: ``FrameWriter.put`` never waits, and a full queue is a fault with a name.
"""

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import IO

from mlx_k2.errors import ProtocolError
from mlx_k2.protocol.framing import Frame, Kind, encode_frame, read_frame

QUEUE_FRAMES = 4096


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
        before: Callable[[IO[bytes]], None] | None = None,
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
        end: ProtocolError | None = ProtocolError("the control connection's reader failed")
        try:
            if self._before is not None:
                self._before(self._stream)
            while (frame := read_frame(self._stream)) is not None:
                self._on_frame(frame)
            end = None
        except ProtocolError as error:
            end = error
        except (OSError, ValueError) as error:
            end = ProtocolError(f"the control connection broke: {error}")
        finally:  # also where on_frame has a fault of its own: whoever waits must hear of it
            self._on_end(end)
