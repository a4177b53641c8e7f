"""Line log: writes lines on a separate thread, so that a stopped terminal or a full pipe does not stop the server."""

import queue
import threading
from collections.abc import Callable
from contextlib import suppress

MAX_LINES = 10_000
_EXIT_TIMEOUT_S = 1.0


class LineLog:
    """A context manager whose ``write`` does not block. While MAX_LINES wait to be written, new lines are dropped."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_LINES)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    def __enter__(self) -> "LineLog":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._put(None)
        self._thread.join(_EXIT_TIMEOUT_S)

    def write(self, line: str) -> None:
        """Queue a line for the writing thread."""
        self._put(line)

    def _put(self, line: str | None) -> None:
        with suppress(queue.Full):
            self._lines.put_nowait(line)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            with suppress(Exception):  # a closed terminal, or text that it refuses, must not end the log
                self._write(line)
