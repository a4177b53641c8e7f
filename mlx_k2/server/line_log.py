"""Line log: writes lines on a separate thread, so that a stopped terminal or a full pipe does not stop the server."""

import queue
import threading
from collections.abc import Callable

MAX_LINES = 10_000
_END_S = 1.0


class LineLog:
    """A context manager whose ``write`` never blocks. Lines are dropped while MAX_LINES wait to be written."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_LINES)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    def __enter__(self) -> "LineLog":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._put(None)
        self._thread.join(_END_S)

    def write(self, line: str) -> None:
        """Write a line soon."""
        self._put(line)

    def _put(self, line: str | None) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            return

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write(line)
            except Exception:  # noqa: BLE001, S112 - the terminal is gone, or refuses the text: the server continues
                continue
