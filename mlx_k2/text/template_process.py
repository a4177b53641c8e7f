"""The owner of the process of text/template_worker.py: starts it when needed, ends it when it exceeds a limit.

Templates are rendered in a separate process, because a template can compute without end, and so that the threads of
this program can run meanwhile.
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

_CHECK_INTERVAL_S = 0.05
_EXTRA_TIMEOUT_S = 60.0
"""Time limit of an answer beyond ten times the CPU time that its request may use, for a busy machine."""
_NEEDS_MEMORY = "needs more memory than chat templates may use"


class TemplateProcess:
    """A worker process, started at the first request and whenever it has ended before. Safe to use on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None

    def render(self, request: TemplateRequest) -> str:
        """Return the rendered text, or the TemplateNames as JSON for a request without variables.

        Raises:
            TemplateRefusal: the template refuses the variables with raise_exception.
            TemplateFailure: the rendering fails or exceeds a limit.
        """
        message = pickle.dumps(request)
        with self._lock:
            try:
                answer = self._exchange(message, request)
            except BaseException:  # also from a signal handler: the next request must not get this answer
                self.end()
                raise
        text = answer[1:].decode(errors="surrogatepass")
        match answer[:1]:
            case Status.RENDERED:
                return text
            case Status.REFUSED:
                raise TemplateRefusal(text)
        # The text of an error outside of JinjaTemplate lacks the file's name; for a MemoryError it is empty.
        raise TemplateFailure(text if text.startswith(FILE) else f"{FILE}: {text or _NEEDS_MEMORY}")

    def _exchange(self, message: bytes, request: TemplateRequest) -> bytes:
        """Send a request to the worker process; return its answer."""
        worker = self._running_worker()
        assert worker.stdin and worker.stdout
        deadline = time.monotonic() + _EXTRA_TIMEOUT_S + 10 * request.max_cpu_s
        unsent = memoryview(len(message).to_bytes(LENGTH_BYTES, "little") + message)
        received = bytearray()
        while True:
            num_missing = LENGTH_BYTES + int.from_bytes(received[:LENGTH_BYTES], "little") - len(received)
            if num_missing <= 0:
                return bytes(received[LENGTH_BYTES:])
            writers = [worker.stdin] if unsent else []
            readable, writable, _ = select.select([worker.stdout], writers, [], _CHECK_INTERVAL_S)
            if writable:
                with suppress(BrokenPipeError):  # then stdout ends, too
                    unsent = unsent[os.write(worker.stdin.fileno(), unsent) :]
            if readable:
                part = os.read(worker.stdout.fileno(), 1 << 20)
                received += part
                if not part:
                    raise TemplateFailure(f"{FILE}: {_exit_reason(worker, request)}")
            elif num_missing > MAX_BYTES or _resident_bytes(worker.pid) > MAX_BYTES:
                raise TemplateFailure(f"{FILE}: {_NEEDS_MEMORY}")
            elif time.monotonic() > deadline:
                raise TemplateFailure(f"{FILE}: its process gave no answer")

    def _running_worker(self) -> subprocess.Popen[bytes]:
        """Return the worker process; start it if it does not run."""
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
        """End the process after the current request; a later request starts it again."""
        with self._lock:
            self.end()

    def end(self) -> None:
        """End the process at once; the next request starts it again."""
        if self._worker is not None:
            self._worker.kill()
            with suppress(BrokenPipeError), self._worker:  # close the pipes, and wait for the killed process
                pass
            self._worker = None


@functools.cache
def template_process() -> TemplateProcess:
    """Return the worker process that all templates share. It ends with this program."""
    process = TemplateProcess()
    atexit.register(process.end)
    return process


def _exit_reason(worker: subprocess.Popen[bytes], request: TemplateRequest) -> str:
    """Return why the worker process has ended, as the end of a sentence about the template."""
    returncode = worker.wait()
    if returncode == -signal.SIGXCPU:
        return f"did not end within {request.max_cpu_s} s of computing"
    status = f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
    return f"its process ended with {status}"


def _resident_bytes(pid: int) -> int:
    """Return the resident memory of a process; 0 if it has ended."""
    with suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0
