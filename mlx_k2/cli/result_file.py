"""The file of results of many prompts: one JSON object a line, none lost in a crash, in order at the end."""

import fcntl
import os
import stat
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

import msgspec

from mlx_k2.errors import RequestError
from mlx_k2.json_text.parse import JsonError, parse_json
from mlx_k2.private_files import open_private, write_private


class ResultFile:
    """A file of results, locked while this context is open. A result is on the disk when ``write`` returns.

    Results have the order in which they were written until ``sort``. A file that this context created and wrote
    nothing to is removed.

    Raises:
        RequestError: it cannot be opened for writing, is not a regular file, or another run writes it now.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._numbers: Mapping[str, int] = {}
        self._digests: dict[int, str] = {}
        self._lines: dict[int, bytes] = {}
        self._failed: set[int] = set()

    def __enter__(self) -> "ResultFile":
        self._is_new = not self._path.exists()
        self._file = self._locked()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_new and os.fstat(self._file.fileno()).st_size == 0:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def resume(self, numbers: Mapping[str, int]) -> None:
        """Read the results that the file has already. ``numbers`` has the number of each prompt by its digest.

        An incomplete last line is dropped. A result with an error counts as missing.

        Raises:
            RequestError: the file holds something else; it is not changed.
        """
        self._numbers = numbers
        self._digests = {number: digest for digest, number in numbers.items()}
        found = self._file.read()
        whole = found[: found.rfind(b"\n") + 1]
        rest = found[len(whole) :].strip(b"\0")  # some file systems leave NUL bytes after a crash
        if rest and not rest.startswith(b"{"):
            raise self._foreign(whole.count(b"\n") + 1)
        for at, line in enumerate(whole.splitlines(keepends=True), start=1):
            number, is_error = self._read(line, at)
            if not is_error:
                self._lines[number] = line
        self._file.truncate(len(whole))
        self._file.seek(len(whole))

    def __contains__(self, number: int) -> bool:
        """Return whether the file has a result of this prompt other than an error."""
        return number in self._lines and number not in self._failed

    def __len__(self) -> int:
        return len(self._lines) - len(self._failed)

    def write(self, number: int, result: Mapping[str, object]) -> None:
        """Append the result of a prompt, and wait until it is on the disk.

        Raises:
            OSError: the disk is full, or the file cannot be written for another reason; has the file's name.
        """
        line = msgspec.json.encode({**result, "run": self._digests[number]}) + b"\n"
        try:
            unwritten = memoryview(line)
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
            os.fsync(self._file.fileno())
        except OSError as error:  # a full disk: the system names no file
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        self._lines[number] = line
        if "error" in result:
            self._failed.add(number)

    def sort(self) -> None:
        """Replace the file by one with the results in the order of their prompts; an end meanwhile loses nothing."""
        write_private(self._path.resolve(), b"".join(line for _, line in sorted(self._lines.items())))

    def _locked(self) -> FileIO:
        """Open the file, and lock it until it is closed."""
        try:
            number = open_private(str(self._path), os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
        except OSError as error:
            raise RequestError(f"{self._path} cannot be written: {error.strerror or error}") from None
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise RequestError(f"{self._path} is not a file: --out is read again when a run goes on after its end")
        file = FileIO(number, "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_current = os.path.samestat(os.fstat(number), self._path.stat())  # else its last run has just replaced it
        except OSError:
            is_current = False
        if not is_current:
            file.close()
            raise RequestError(f"{self._path} is being written by another run: give another --out")
        return file

    def _read(self, line: bytes, at: int) -> tuple[int, bool]:
        """Return the number of the prompt of a result, and whether it is an error."""
        try:
            result = parse_json(line)
        except JsonError:
            raise self._foreign(at) from None
        digest = result.get("run") if isinstance(result, dict) else None
        if not isinstance(digest, str) or digest not in self._numbers:
            raise self._foreign(at)
        return self._numbers[digest], "error" in result

    def _foreign(self, number: int) -> RequestError:
        return RequestError(
            f"{self._path} belongs to another run (see its line {number}): give another --out, or move the file away"
        )
