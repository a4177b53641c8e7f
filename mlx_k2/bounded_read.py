"""Reading of files and streams that the user names, up to a limit: /dev/zero has no end. Knows no content."""

import errno
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 16 * 1024 * 1024
"""The limit for settings, schemas, a prompt, and a line of a file of prompts."""


def read_file(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: the file cannot be read, or is longer than ``max_bytes``.
    """
    with path.open("rb") as file:
        return read_stream(file, max_bytes)


def read_stream(stream: BinaryIO, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the rest of a stream.

    Raises:
        OSError: the stream cannot be read, or its rest is longer than ``max_bytes``.
    """
    data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it is longer than {max_bytes // 1024**2} MiB")
    return data
