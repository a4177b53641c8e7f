"""A file of prompts, one JSON object a line, and the digest that identifies the result of a line. Runs nothing."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec

from mlx_k2.bounded_read import MAX_BYTES
from mlx_k2.chat.sampling_options import SamplingOptions
from mlx_k2.errors import RequestError
from mlx_k2.json_text.parse import JsonError, parse_json
from mlx_k2.json_text.read import convert

_DEFAULTS = SamplingOptions()


class PromptLine(SamplingOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt, text or conversation, with optional tools, and the sampling options of its answer.

    ``messages`` and ``tools`` are in OpenAI's format; nothing runs the calls of an answer.
    """

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    id: str | int | None = None


def read_prompt_lines(source: str, options: SamplingOptions = _DEFAULTS) -> dict[int, PromptLine]:
    """Return the lines of a file of prompts, or of standard input for "-", by number from 1. Blank lines are left out.

    ``options`` are the defaults of each line, except the seed, which differs by line.

    Raises:
        RequestError: a line is malformed, too long, has an unknown key, a value out of range or the id of another line,
            or has not exactly one prompt (names the line), or the file is unreadable or has no line.
    """
    name = "standard input" if source == "-" else source
    defaults = msgspec.to_builtins(msgspec.structs.replace(options, seed=None), str_keys=True)
    lines: dict[int, PromptLine] = {}
    numbers: dict[str | int, int] = {}  # by id
    for number, text in enumerate(_read_lines(source), start=1):
        if len(text) > MAX_BYTES:
            raise RequestError(f"{name}, line {number}: it is longer than {MAX_BYTES // 1024**2} MiB")
        if not text.strip():
            continue
        try:
            value = parse_json(text.rstrip())
            line = convert(defaults | value if isinstance(value, dict) else value, PromptLine)
        except (JsonError, RequestError) as error:
            raise RequestError(f"{name}, line {number}: {error}") from None
        if (line.prompt is None) == (line.messages is None):
            raise RequestError(f'{name}, line {number}: give either "prompt" or "messages"')
        line_id = number if line.id is None else line.id  # as its result has it
        if (first_number := numbers.setdefault(line_id, number)) != number:
            raise RequestError(f"{name}, line {number}: line {first_number} has the same id {line_id!r}")
        lines[number] = line
    if not lines:
        raise RequestError(f"{name} has no line: write one JSON object a line")
    return lines


def result_digest(run: object, number: int, line: PromptLine) -> str:
    """Return a digest of what a result depends on: the model and options of the run, and the line with its number."""
    values = msgspec.to_builtins([run, number, line], str_keys=True)  # the keys of a logit bias are numbers
    content = msgspec.json.encode(values, order="sorted")
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _read_lines(source: str) -> Iterator[bytes]:
    """Yield the lines. A line that is longer than MAX_BYTES is cut after one more byte."""
    if source == "-" and sys.stdin is None:
        raise RequestError("there is no standard input: give a file as --prompts")
    try:
        with nullcontext(sys.stdin.buffer) if source == "-" else Path(source).open("rb") as file:
            yield from iter(lambda: file.readline(MAX_BYTES + 1), b"")
    except OSError as error:
        raise RequestError(f"{source} cannot be read: {error.strerror}") from None
