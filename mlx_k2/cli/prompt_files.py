"""A file of prompts and the file of their results, both with one JSON object a line. Runs nothing."""

import fcntl
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec

from mlx_k2.chat.sampling_options import SamplingOptions
from mlx_k2.errors import RequestError
from mlx_k2.json_text.parse import JsonError, parse_json
from mlx_k2.json_text.read import read_json
from mlx_k2.private_files import open_private


class PromptLine(SamplingOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt, text or conversation, with optional tools and values that override the options.

    ``messages`` and ``tools`` are in OpenAI's format; nothing runs the calls of an answer.
    """

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    id: str | int | None = None


def read_prompt_lines(path: Path) -> list[PromptLine]:
    """Return every line of a file of prompts.

    Raises:
        RequestError: a line is malformed, has an unknown key, or has not exactly one prompt (names the line), or the
            file is unreadable or has no line.
    """
    lines = []
    for number, text in enumerate(_read(path).splitlines(), start=1):
        try:
            line = read_json(text, PromptLine)
        except (JsonError, RequestError) as error:
            raise RequestError(f"{path}, line {number}: {error}") from None
        if (line.prompt is None) == (line.messages is None):
            raise RequestError(f'{path}, line {number}: give either "prompt" or "messages"')
        lines.append(line)
    if not lines:
        raise RequestError(f"{path} has no line: write one JSON object a line")
    return lines


def line_seed(seed: int, index: int) -> int:
    """Return the seed of line ``index`` (from 0), 0 to 2^63 - 1."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def run_digest(model_digest: str, options: object, line: PromptLine) -> str:
    """Return a digest that identifies the model, the options and the prompt of a result."""
    content = [model_digest, options, line]
    return hashlib.blake2b(msgspec.json.encode(content, order="sorted"), digest_size=8).hexdigest()


class ResultFile:
    """A file of results in the order of their prompts, each flushed as soon as all before it are written. A context.

    ``digests`` holds one digest for each prompt. Results of the same run that the file already holds are kept, and
    ``num_done`` is the number of results in the file. An incomplete last line is dropped.

    Raises:
        RequestError: the file holds something else, and is not changed; or another run writes it now.
    """

    def __init__(self, path: Path, digests: Sequence[str]) -> None:
        self._path = path
        self._digests = digests
        self._waiting: dict[int, dict[str, Any]] = {}
        self.num_done = 0
        if path.exists():
            with self._locked(os.O_RDWR) as file:
                self._read_results(file.read())

    def __enter__(self) -> "ResultFile":
        self._file = self._locked(os.O_RDWR | os.O_CREAT)
        try:
            kept_bytes = self._read_results(self._file.read())  # another run may have changed it since __init__
            self._file.truncate(kept_bytes)
            self._file.seek(kept_bytes)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, index: int, result: Mapping[str, Any]) -> None:
        """Add the result of prompt ``index``; it is written as soon as all before it are.

        Raises:
            OSError: the disk is full, or the file cannot be written for another reason; has the file's name.
        """
        self._waiting[index] = {**result, "run": self._digests[index]}
        while self.num_done in self._waiting:
            try:
                self._file.write(msgspec.json.encode(self._waiting.pop(self.num_done)) + b"\n")
                self._file.flush()
            except OSError as error:  # a full disk: the system names no file
                raise OSError(error.errno, error.strerror, str(self._path)) from None
            self.num_done += 1

    def _locked(self, flags: int) -> BinaryIO:
        """Open the file, and lock it until it is closed."""
        try:
            file = os.fdopen(open_private(str(self._path), flags), "r+b")
        except OSError as error:
            raise RequestError(f"{self._path} cannot be written: {error.strerror or error}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RequestError(f"{self._path} is being written by another run: give another --out") from None
        return file

    def _read_results(self, found: bytes) -> int:
        """Count the results in the file; return the number of their bytes."""
        whole = found[: found.rfind(b"\n") + 1]
        if len(whole) < len(found) and not found[len(whole) :].startswith(b"{"):
            raise self._foreign(whole.count(b"\n") + 1)
        lines = whole.splitlines()
        if len(lines) > len(self._digests):
            raise self._foreign(len(self._digests) + 1)
        for number, (line, digest) in enumerate(zip(lines, self._digests, strict=False), start=1):
            if _digest_of(line) != digest:
                raise self._foreign(number)
        self.num_done = len(lines)
        return len(whole)

    def _foreign(self, number: int) -> RequestError:
        return RequestError(
            f"{self._path} belongs to another run (see its line {number}): give another --out, or move the file away"
        )


def _digest_of(line: bytes) -> object:
    try:
        result = parse_json(line)
    except JsonError:
        return None
    return result.get("run") if isinstance(result, dict) else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
