"""Recorder of the source lines of one package that run in a process, and of the frames that it reads and writes.

`bench.token_path` copies this file to ``sitecustomize.py`` in a folder on PYTHONPATH, so that Python runs it first in
each process of the measured program. It imports only the standard library. Of the program it knows
``read_frame``, which returns the next frame of a stream as an object with a ``payload``, the messages whose type begins
with Step, and the threads named heartbeat.

Each process writes ``PID.json`` when it ends: a list of events ``[kind, thread, detail]`` in the order in which they
happened. Recording begins with the first frame that is read and holds a step plan or a StepDone. The kinds:

- ``line``: a line of the package ran; the detail is its file. An event equal to the previous one is left out, and so
  are the lines of heartbeat threads, which run on a timer.
- ``enter``: ``read_frame`` was called.
- ``read``: a call of ``read`` or ``readinto``, functions in C, returned to a function of the package.
- ``frame``: ``read_frame`` returned a step plan or a StepDone; the detail is the payload in hexadecimal.
- ``write``: a C function wrote StepDone frames; the detail is their number.
- ``flush``: a call of ``flush``, a function in C, returned to a function of the package.
- ``stdout``: text was written to sys.stdout and flushed.
"""

import atexit
import io
import json
import os
import re
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from _typeshed import TraceFunction

PACKAGE_VARIABLE = "TOKEN_PATH_PACKAGE"
"""Environment variable: the folder of the package."""
FOLDER_VARIABLE = "TOKEN_PATH_FOLDER"
"""Environment variable: the folder for ``PID.json``."""

_STEP_MESSAGE = re.compile(
    rb"type[\xa0-\xbf]Step"
)  # Step or StepDone in msgpack: the key, the header of a short string, the tag
_STEP_DONE_TAG = b"StepDone"
_READ_FUNCTIONS = ("read", "readinto")


class LineRecorder:
    """Recorder of the events of this process. ``save`` ends the recording and writes them to ``path``."""

    def __init__(self, package: str, path: Path) -> None:
        self._prefix = package + os.sep
        self._path = path
        self._events: list[tuple[str, int, str]] = []
        self._recording = False
        self._save_lock = threading.Lock()
        self._this_thread = threading.local()
        self._real_exit = os._exit

    def install(self) -> None:
        """Trace this thread and all later ones, and save the events when the process ends."""
        sys.stdout = RecordedStdout(self)
        os._exit = self._exit  # guards and stages end with os._exit, which runs no atexit function
        atexit.register(self.save)
        threading.settrace(self._on_call)
        sys.settrace(self._on_call)

    def add(self, kind: str, detail: str = "") -> None:
        """Append an event while recording, unless it equals the line event before it."""
        event = (kind, threading.get_ident(), detail)
        events = self._events
        if self._recording and not (kind == "line" and events and events[-1] == event):
            events.append(event)

    def save(self) -> None:
        """Write the file once. A second caller waits until it is written."""
        sys.settrace(None)
        sys.setprofile(None)
        with self._save_lock:
            self._recording = False
            events, self._events = self._events, []
            if events:
                shortened = [(kind, thread, detail.removeprefix(self._prefix)) for kind, thread, detail in events]
                self._path.write_text(json.dumps(shortened))

    def _exit(self, status: int) -> NoReturn:
        self.save()
        self._real_exit(status)

    def _on_call(self, frame: FrameType, _event: str, _arg: object) -> "TraceFunction | None":
        if not frame.f_code.co_filename.startswith(self._prefix):
            return None
        if frame.f_code.co_name != "read_frame":
            return self._on_line
        self.add("enter")
        return self._on_line_of_read_frame

    def _on_line(self, frame: FrameType, event: str, _arg: object) -> "TraceFunction":
        if self._recording and event == "line":
            self._profile_thread()
            if self._this_thread.records_lines:
                self.add("line", frame.f_code.co_filename)
        return self._on_line

    def _on_line_of_read_frame(self, frame: FrameType, event: str, arg: object) -> "TraceFunction":
        if event == "return" and arg is not None:
            payload: bytes = getattr(arg, "payload", b"")
            if _STEP_MESSAGE.search(payload):
                self._recording = True
                self.add("frame", payload.hex())
        else:
            self._on_line(frame, event, arg)
        return self._on_line_of_read_frame

    def _profile_thread(self) -> None:
        """In a new thread, record C functions too, and decide whether its lines are recorded.

        A thread is not profiled before recording begins, because that would slow down the start of the program.
        """
        if not hasattr(self._this_thread, "records_lines"):
            self._this_thread.records_lines = "heartbeat" not in threading.current_thread().name
            sys.setprofile(self._on_c_function)

    def _on_c_function(self, frame: FrameType, event: str, arg: object) -> None:
        if event != "c_return" or not frame.f_code.co_filename.startswith(self._prefix):
            return
        name = getattr(arg, "__name__", "")
        if name in _READ_FUNCTIONS:
            self.add("read")
        elif name == "flush":
            self.add("flush")
        elif name == "write":
            # A profile function does not get the arguments: what was written is one of the caller's local variables.
            counts = [value.count(_STEP_DONE_TAG) for value in frame.f_locals.values() if isinstance(value, bytes)]
            if count := max(counts, default=0):
                self.add("write", str(count))


class RecordedStdout(io.TextIOWrapper):
    """Replacement of sys.stdout, with its buffer, that records each flush after a write."""

    def __init__(self, recorder: LineRecorder) -> None:
        original = sys.stdout  # sys.__stdout__ keeps it alive: its garbage collection would close the buffer
        assert isinstance(original, io.TextIOWrapper)
        super().__init__(original.buffer, original.encoding, original.errors, line_buffering=original.line_buffering)
        self._recorder = recorder
        self._pending = False

    def write(self, text: str, /) -> int:
        """Write ``text``."""
        self._pending = self._pending or bool(text)
        return super().write(text)

    def flush(self) -> None:
        """Flush; record it if text was written since the last flush."""
        super().flush()
        if self._pending:
            self._pending = False
            self._recorder.add("stdout")


if __name__ == "sitecustomize":
    LineRecorder(os.environ[PACKAGE_VARIABLE], Path(os.environ[FOLDER_VARIABLE]) / f"{os.getpid()}.json").install()
