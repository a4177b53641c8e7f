"""A transcript of a chat, appended to a file as JSON lines while the chat runs. Knows no terminal."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from mlx_k2.chat.chat_events import CallEnded, Event, MessageAdded
from mlx_k2.errors import RequestError
from mlx_k2.private_files import open_private
from mlx_k2.text.reply_parts import Content, Reasoning


def _open_without_wait(path: str, flags: int) -> int:
    """Return the descriptor of a file as `open_private` does; for a named pipe without a reader, fail at once."""
    descriptor = open_private(path, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


class Transcript:
    """A file with a line for each part of a reply, each ended call, and each complete message. A context manager.

    A failed write, as on a full disk, ends the transcript and calls ``notify`` once. The chat continues.

    Raises:
        RequestError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path, notify: Callable[[str], None]) -> None:
        self._path = path
        self._notify = notify
        try:
            self._file = open(path, "ab", buffering=0, opener=_open_without_wait)  # noqa: SIM115 - Path.open has no opener
        except OSError as error:
            raise RequestError(f"the transcript {path} cannot be written: {error.strerror}") from None

    def __enter__(self) -> "Transcript":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write_event(self, event: Event) -> None:
        """Write the line of a part of a reply, an ended call, or a complete message. Other events have none."""
        match event:
            case Reasoning(text):
                self.write({"reasoning": text})
            case Content(text):
                self.write({"content": text})
            case CallEnded(call, result):
                self.write({"call": {"name": call.name, "arguments": call.arguments, "ended": result.outcome.value}})
            case MessageAdded(message):
                self.write({"message": message.json_value()})

    def write(self, line: Mapping[str, object]) -> None:
        """Append one line; do nothing after a failed write."""
        if self._file.closed:
            return
        try:
            self._file.write(msgspec.json.encode({"at": time.strftime("%Y-%m-%dT%H:%M:%S"), **line}) + b"\n")
        except OSError as error:
            self._file.close()
            reason = error.strerror
            self._notify(f"the transcript {self._path} cannot be written any more: {reason}; the chat continues")
