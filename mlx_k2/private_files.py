"""Files that only their owner can read: conversations, results and logs. Knows no content."""

import contextlib
import os
import secrets
from pathlib import Path

import platformdirs

PRIVATE = 0o600


def home_folder() -> Path:
    """Return the user's home folder, or a folder that does not exist for a user without one, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/nonexistent")


def state_folder() -> Path | None:
    """Return the folder in which this program keeps its state, or None for a user without a home folder."""
    try:
        folder = platformdirs.user_state_path("mlx-k2")
    except RuntimeError:  # platformdirs 4.14; earlier versions return a relative path
        return None
    return folder if folder.is_absolute() else None


def open_private(path: str, flags: int) -> int:
    """Open a file as ``open(..., opener=open_private)`` does; a new file is readable by its owner alone."""
    return os.open(path, flags, PRIVATE)


def open_ours(path: str, flags: int) -> int:
    """Open a file whose name the program chose, as `open_private` does. Refuse a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW, PRIVATE)


def write_private(path: Path, data: bytes) -> None:
    """Write a file for its owner alone, as `write_whole` does."""
    write_whole(path, data, PRIVATE)


def write_whole(path: Path, data: bytes, mode: int) -> None:
    """Write a file with the permissions ``mode``, or leave an existing one unchanged.

    The data is written to a new file with a random name in the same folder, which then replaces it.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.part")
    try:
        with open(partial, "xb", opener=open_ours) as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())  # else a crash may leave an empty file instead of the old one
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
