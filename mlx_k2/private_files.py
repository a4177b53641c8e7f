"""Files that only their owner can read, such as conversations, results and logs; atomic writes. Knows no content."""

import contextlib
import os
import secrets
from pathlib import Path

import platformdirs

_OWNER_ONLY_MODE = 0o600
_NUM_KEPT_CHARS = 50  # of a name in its temporary file: at most 200 of the 255 bytes that a name may have


def home_folder() -> Path:
    """Return the user's home folder; for a user without one, as in some containers, a folder that does not exist."""
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
    """Return the descriptor of a file, for ``open(..., opener=open_private)``. Only the owner can read a new file."""
    return os.open(path, flags, _OWNER_ONLY_MODE)


def open_private_no_symlink(path: str, flags: int) -> int:
    """Return the descriptor of a file whose name the program chose, as `open_private` does; refuse a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW, _OWNER_ONLY_MODE)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, as `write_atomically` does."""
    write_atomically(path, data, _OWNER_ONLY_MODE)


def write_atomically(path: Path, data: bytes, mode: int) -> None:
    """Write a file with the permissions ``mode``. After an error an existing file is unchanged.

    The data is written to a new file with a random name in the same folder, which then replaces ``path``.

    Raises:
        OSError: the file cannot be written.
    """
    temporary_path = path.with_name(f".{path.name[:_NUM_KEPT_CHARS]}.{secrets.token_hex(8)}.part")
    try:
        with open(temporary_path, "xb", opener=open_private_no_symlink) as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())  # else a crash may leave an empty file instead of the old one
        temporary_path.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary_path.unlink(missing_ok=True)
        raise
