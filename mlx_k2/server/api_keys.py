"""API keys: a private file with their digests, and the check of a request's key. Knows no HTTP.

A digest is SHA-256: a key has 256 random bits, so that a slow hash is not needed. The key itself is printed once, when
it is made, and not stored.
"""

import fcntl
import hashlib
import hmac
import os
import secrets
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from mlx_k2.bounded_read import read_stream
from mlx_k2.errors import SetupError
from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import read_json
from mlx_k2.private_files import open_private, write_private

KEY_PREFIX = "mk2-"
_KEY_BYTES = 32
_GROUP_AND_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class StoredKey(msgspec.Struct, frozen=True):
    """One key: its name, its SHA-256 in hexadecimal digits, and the time of its creation in seconds since 1970."""

    name: str
    sha256: str
    created: int


class _KeyFile(msgspec.Struct, frozen=True):
    keys: list[StoredKey]


def read_keys(path: Path) -> tuple[StoredKey, ...]:
    """Return the keys in a file; () if there is no such file.

    Raises:
        SetupError: the file cannot be used, or others can read it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = read_stream(file)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise SetupError(f"the key file {path} cannot be read: {error.strerror}") from None
    if mode & _GROUP_AND_OTHERS:
        raise SetupError(f"others can read the key file {path}: run `chmod 600 {shlex.quote(str(path))}`")
    try:
        return tuple(read_json(data, _KeyFile).keys)
    except JsonError as error:
        raise SetupError(f"the key file {path} cannot be used: {error}") from None


def add_key(path: Path, name: str) -> str:
    """Make a key, store its digest in the file, and return the key.

    Raises:
        SetupError: the name is empty or in use, or the file cannot be used or written.
    """
    if not name:
        raise SetupError("the name of a key is empty: give one")
    key = KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    with _editing(path) as keys:
        if any(key.name == name for key in keys):
            raise SetupError(f"there is a key {name!r} already: remove it first, or give another name")
        keys.append(StoredKey(name, _digest(key), int(time.time())))
    return key


def remove_key(path: Path, name: str) -> None:
    """Remove a key from the file, which stays, also without keys. A running server refuses the key at once.

    Raises:
        SetupError: there is no such key, or the file cannot be used or written.
    """
    with _editing(path) as keys:
        if all(key.name != name for key in keys):
            names = ", ".join(key.name for key in keys) or "none"
            raise SetupError(f"there is no key {name!r} in {path}; its keys: {names}")
        keys[:] = [key for key in keys if key.name != name]


class KeyRing:
    """The valid keys of a running server. The file is read again after each change.

    With ``is_required`` False a request needs no key until the file exists, even without keys: neither the removal of
    the last key nor that of the file while the server runs opens the server. ``log`` is called with the problem of a
    changed file that cannot be used; the previous keys then stay valid.
    """

    def __init__(self, path: Path, *, is_required: bool, log: Callable[[str], None] = lambda _: None) -> None:
        self._path = path
        self._log = log
        self._logged_problem = ""
        self._file_version: tuple[int, int, int] | None = None
        """Modification and change time in ns, and inode, of the file that ``_refresh`` read; None: it has read none."""
        self._keys = read_keys(path)
        self.is_required = is_required or path.exists()

    def owner(self, given: str | None) -> str | None:
        """Return the name of a valid key, and "" if no key is required; None: refuse the request."""
        self._refresh()
        if not self.is_required:
            return ""
        digest = _digest(given or "")
        names = [key.name for key in self._keys if hmac.compare_digest(key.sha256, digest)]  # constant time: all keys
        return names[0] if names else None

    def _refresh(self) -> None:
        """Read the file again if it was changed. A changed file that cannot be used is tried at each call."""
        version = None
        with suppress(OSError):
            status = self._path.stat()
            version = (status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        if version == self._file_version:
            return
        try:
            self._keys = read_keys(self._path)
        except SetupError as error:
            if str(error) != self._logged_problem:
                self._log(f"{error}; the previous keys stay valid")
            self._logged_problem = str(error)
            return
        self._file_version, self._logged_problem = version, ""
        self.is_required = self.is_required or version is not None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@contextmanager
def _editing(path: Path) -> Iterator[list[StoredKey]]:
    """Yield the keys in a file as a list; on exit write it to the file. A second process that edits waits."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f"{path.name}.lock"), "wb", opener=open_private) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = list(read_keys(path))
            yield keys
            write_private(path, msgspec.json.format(msgspec.json.encode(_KeyFile(keys))))
    except OSError as error:
        raise SetupError(f"the key file {path} cannot be written: {error.strerror}") from None
