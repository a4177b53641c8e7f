"""The file of results of many prompts, one JSON object a line. Knows no model."""

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
    """A context manager for a file of results, which it locks. A result is on the disk when ``write`` returns.

    Results are in the order of writing until ``sort``. On exit, a file that the context created is removed if it is
    empty.

    Raises:
        RequestError: the file cannot be opened for writing, is not a regular file, or another run writes it now.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._numbers_by_digest: Mapping[str, int] = {}
        self._digests: dict[int, str] = {}  # by the number of the prompt
        self._lines: dict[int, bytes] = {}  # results by the number of the prompt, errors of this run included
        self._failed_numbers: set[int] = set()

    def __enter__(self) -> "ResultFile":
        self._is_new = not self._path.exists()
        self._file = self._open_locked()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_new and os.fstat(self._file.fileno()).st_size == 0:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def resume(self, numbers_by_digest: Mapping[str, int]) -> None:
        """Read the results in the file.

        The field "run" of a result is a digest of model, options and prompt. ``numbers_by_digest`` maps it to the
        prompt's number. An incomplete last line is dropped. A result with an error counts as missing.

        Raises:
            RequestError: the file has a line that is no result of this run; the file is not changed.
        """
        self._numbers_by_digest = numbers_by_digest
        self._digests = {number: digest for digest, number in numbers_by_digest.items()}
        content = self._file.read()
        complete_lines = content[: content.rfind(b"\n") + 1]
        last_line = content[len(complete_lines) :].strip(b"\0")  # some file systems leave NUL bytes after a crash
        if last_line and not last_line.startswith(b"{"):
            raise self._foreign_file_error(complete_lines.count(b"\n") + 1)
        for line_number, line in enumerate(complete_lines.splitlines(keepends=True), start=1):
            number, is_error = self._parse(line, line_number)
            if not is_error:
                self._lines[number] = line
        self._file.truncate(len(complete_lines))
        self._file.seek(len(complete_lines))

    def __contains__(self, number: int) -> bool:
        """Return whether the file has a result of this prompt other than an error."""
        return number in self._lines and number not in self._failed_numbers

    def __len__(self) -> int:
        return len(self._lines) - len(self._failed_numbers)

    def write(self, number: int, result: Mapping[str, object]) -> None:
        """Append the result of a prompt, and wait until it is on the disk.

        Raises:
            OSError: the disk is full, or the file cannot be written for another reason; has the file's name.
        """
        line = msgspec.json.encode({**result, "run": self._digests[number]}) + b"\n"
        try:
            unwritten_bytes = memoryview(line)
            while unwritten_bytes:
                unwritten_bytes = unwritten_bytes[self._file.write(unwritten_bytes) :]
            os.fsync(self._file.fileno())
        except OSError as error:  # the system's error does not name the file
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        self._lines[number] = line
        if "error" in result:
            self._failed_numbers.add(number)

    def sort(self) -> None:
        """Replace the file by one with the results in the order of their prompts. A crash meanwhile loses no result."""
        write_private(self._path.resolve(), b"".join(line for _, line in sorted(self._lines.items())))

    def _open_locked(self) -> FileIO:
        """Return the open file, which stays locked until it is closed."""
        try:
            # O_NONBLOCK: a pipe or a device is refused below, without a wait for its other end
            descriptor = open_private(str(self._path), os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
        except OSError as error:
            raise RequestError(f"{self._path} cannot be written: {error.strerror or error}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise RequestError(f"{self._path} is not a regular file: a run that continues reads its results from --out")
        file = FileIO(descriptor, "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # another run may have replaced the file by its sorted results after the file was opened here
            is_current = os.path.samestat(os.fstat(descriptor), self._path.stat())
        except OSError:
            is_current = False
        if not is_current:
            file.close()
            raise RequestError(f"{self._path} is being written by another run: give another --out")
        return file

    def _parse(self, line: bytes, line_number: int) -> tuple[int, bool]:
        """Return the number of a result's prompt, and whether the result is an error."""
        try:
            result = parse_json(line)
        except JsonError:
            raise self._foreign_file_error(line_number) from None
        digest = result.get("run") if isinstance(result, dict) else None
        if not isinstance(digest, str) or digest not in self._numbers_by_digest:
            raise self._foreign_file_error(line_number)
        return self._numbers_by_digest[digest], "error" in result

    def _foreign_file_error(self, line_number: int) -> RequestError:
        return RequestError(
            f"{self._path} belongs to another run (see its line {line_number}): give another --out, or move the file "
            "away"
        )
