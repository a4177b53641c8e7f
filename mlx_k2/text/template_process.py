"""The process of text/template_worker.py, as seen from the program: started when needed, ended when it exceeds a limit.

It is a separate process because a template can compute without end in one call, and so that the program's other threads
run meanwhile.
"""

import atexit
import functools
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil

from mlx_k2.text.jinja_template import FILE, TemplateFailure, TemplateRefusal
from mlx_k2.text.template_worker import LENGTH_BYTES, MAX_BYTES, Status, TemplateRequest

_LOOK_EVERY_S = 0.05
_ANSWER_S = 60.0
"""Time limit for an answer on a busy machine, beyond ten times the CPU time that the request may use."""
_TOO_LARGE = "needs more memory than chat templates may use"


class TemplateProcess:
    """A worker process, started at the first request and again after one that ended it. Safe to use on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None

    def render(self, request: TemplateRequest) -> str:
        """Return the rendered text, or the names of the template as JSON for a request without variables.

        Raises:
            TemplateRefusal: the template itself refuses the variables.
            TemplateFailure: the rendering fails or exceeds a limit.
        """
        message = pickle.dumps(request)
        with self._lock:
            try:
                answer = self._ask(message, request)
            except BaseException:  # also a signal handler's: else the next request would get this answer
                self.end()
                raise
        text = answer[1:].decode(errors="surrogatepass")
        match answer[:1]:
            case Status.RENDERED:
                return text
            case Status.REFUSED:
                raise TemplateRefusal(text)
        raise TemplateFailure(text if text.startswith(FILE) else f"{FILE}: {text or _TOO_LARGE}")

    def _ask(self, message: bytes, request: TemplateRequest) -> bytes:
        worker = self._started()
        assert worker.stdin and worker.stdout
        deadline = time.monotonic() + _ANSWER_S + 10 * request.max_cpu_s
        unsent = memoryview(len(message).to_bytes(LENGTH_BYTES, "little") + message)
        received = bytearray()
        while (missing := LENGTH_BYTES + int.from_bytes(received[:LENGTH_BYTES], "little") - len(received)) > 0:
            readable, writable, _ = select.select([worker.stdout], [worker.stdin] if unsent else [], [], _LOOK_EVERY_S)
            if writable:
                with suppress(BrokenPipeError):  # stdout ends, too
                    unsent = unsent[os.write(worker.stdin.fileno(), unsent) :]
            if readable:
                part = os.read(worker.stdout.fileno(), 1 << 20)
                received += part
                if not part:
                    raise TemplateFailure(f"{FILE}: {_how_it_ended(worker, request)}")
            elif missing > MAX_BYTES or _resident_bytes(worker.pid) > MAX_BYTES:
                raise TemplateFailure(f"{FILE}: {_TOO_LARGE}")
            elif time.monotonic() > deadline:
                raise TemplateFailure(f"{FILE}: its process gave no answer")
        return bytes(received[LENGTH_BYTES:])

    def _started(self) -> subprocess.Popen[bytes]:
        if self._worker is None or self._worker.poll() is not None:
            command = (sys.executable, "-P", "-m", "mlx_k2.text.template_worker")
            try:
                self._worker = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
                )
            except OSError as error:
                raise TemplateFailure(f"{FILE}: its process cannot be started: {error.strerror}") from None
            assert self._worker.stdin
            os.set_blocking(self._worker.stdin.fileno(), False)
        return self._worker

    def close(self) -> None:
        """End the process, between two requests of other threads; a later request starts it again."""
        with self._lock:
            self.end()

    def end(self) -> None:
        """End the process if it runs; the next request starts it again."""
        if self._worker is not None:
            self._worker.kill()
            with suppress(BrokenPipeError), self._worker:  # close the pipes, and wait for the killed process
                pass
            self._worker = None


@functools.cache
def template_process() -> TemplateProcess:
    """Return the worker process that all templates of this program share. It ends with this program."""
    process = TemplateProcess()
    atexit.register(process.end)
    return process


def _how_it_ended(worker: subprocess.Popen[bytes], request: TemplateRequest) -> str:
    returncode = worker.wait()
    if returncode == -signal.SIGXCPU:
        return f"did not end within {request.max_cpu_s} s of computing"
    return f"its process ended with {f'signal {-returncode}' if returncode < 0 else f'exit code {returncode}'}"


def _resident_bytes(pid: int) -> int:
    with suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0
