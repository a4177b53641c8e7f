"""The program of the process that renders chat templates: it reads requests from stdin, and answers each on stdout.

Memory is limited for the process, CPU time for each request. An error of the template is an answer. A template that
exceeds its CPU time in one call of C code, which a signal handler cannot interrupt, ends this process.
"""

import contextlib
import functools
import math
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import IO, NamedTuple

import msgspec

from mlx_k2.text.jinja_template import JinjaTemplate, TemplateFailure, TemplateRefusal

MAX_BYTES = 1 << 30
"""The memory limit of the process."""
LENGTH_BYTES = 8
"""The size of the length that precedes each request and answer, little-endian."""
_MAX_TEMPLATES = 8
_MAX_ERROR_CHARS = 2000
_REPEAT_S = 0.1
"""CPU time after which the exception is raised again: compilers and filters of Jinja catch some exceptions."""
_NICENESS = 5
"""Renderings have a lower priority than the coordinator's threads, which send plans to the stages."""
_KILL_AFTER_S = 1
"""CPU time beyond the limit after which the operating system ends the process."""


class TemplateRequest(NamedTuple):
    """A template and the variables to render it with; None asks for its TemplateNames as JSON."""

    source: str
    variables: Mapping[str, object] | None
    max_cpu_s: float
    max_characters: int


class Status:
    """The first byte of an answer. The rest is text in UTF-8, which may contain lone surrogates."""

    RENDERED = b"0"
    REFUSED = b"1"
    FAILED = b"2"


def main() -> None:
    """Answer requests until stdin ends."""
    with contextlib.suppress(ValueError, OSError):  # macOS does not enforce this; the parent checks the memory, too
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    os.nice(_NICENESS)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while (request := _read(requests)) is not None:
        answer = _answer(request)
        answers.write(len(answer).to_bytes(LENGTH_BYTES, "little") + answer)
        answers.flush()


def _read(stream: IO[bytes]) -> TemplateRequest | None:
    """Return the next request; None at the end of the stream."""
    length = stream.read(LENGTH_BYTES)
    if len(length) < LENGTH_BYTES:
        return None
    request: TemplateRequest = pickle.loads(stream.read(int.from_bytes(length, "little")))  # noqa: S301 - from our parent
    return request


def _answer(request: TemplateRequest) -> bytes:
    try:
        _limit_cpu(request.max_cpu_s)
        try:
            template = _compiled(request.source, request.max_characters)
            if request.variables is None:
                return Status.RENDERED + msgspec.json.encode(template.names)
            return Status.RENDERED + template.render(request.variables).encode(errors="surrogatepass")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except (TemplateRefusal, TemplateFailure, MemoryError) as error:
        status = Status.REFUSED if isinstance(error, TemplateRefusal) else Status.FAILED
        return status + str(error)[:_MAX_ERROR_CHARS].encode(errors="surrogatepass")


@functools.lru_cache(_MAX_TEMPLATES)
def _compiled(source: str, max_characters: int) -> JinjaTemplate:
    return JinjaTemplate(source, max_characters)


def _limit_cpu(cpu_s: float) -> None:
    """Raise TemplateFailure after ``cpu_s`` of CPU time; let the operating system end the process a second later."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TemplateFailure(f"did not end within {cpu_s} s of computing")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, cpu_s, _REPEAT_S)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(time.process_time() + cpu_s) + _KILL_AFTER_S
    if hard_limit != resource.RLIM_INFINITY:
        limit = min(limit, hard_limit)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard_limit))


if __name__ == "__main__":
    main()
