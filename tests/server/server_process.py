"""A real `mlx-k2 serve` process."""

import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
from openai import OpenAI

from tests.cli.command import CommandLine
from tests.server.http_client import WAIT_S, HttpAnswer, connect, exchange, request_bytes


@dataclass
class Server:
    """A running server process, and the lines of its stderr so far."""

    process: subprocess.Popen[bytes]
    lines: list[str]
    changed: threading.Condition
    has_ended: bool = False
    """True once stderr is closed."""

    @property
    def port(self) -> int:
        match = re.search(r":(\d+);", self.wait_for_line("listening on"))
        assert match
        return int(match[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> OpenAI:
        """The official client, without its own retries."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=WAIT_S)

    def wait_for_line(self, text: str) -> str:
        """Wait for a line with ``text`` on stderr and return it."""

        def find_line() -> str | None:
            return next((line for line in self.lines if text in line), None)

        with self.changed:
            self.changed.wait_for(lambda: find_line() is not None or self.has_ended, WAIT_S)
            line = find_line()
            assert line is not None, f"no {text!r} in {self.lines}"
            return line

    def stages(self) -> list[psutil.Process]:
        """Return the stage processes."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in children if "mlx_k2.stage.program" in process.cmdline()]

    def request(self, method: str, path: str, body: object = None, **headers: str) -> HttpAnswer:
        """Send one request on a separate connection and return the whole answer."""
        with self.connect() as connection:
            return exchange(connection, request_bytes(method, path, body, **headers))

    def connect(self) -> socket.socket:
        """Return a connection to the server, with a deadline."""
        return connect(self.port)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)


@contextmanager
def running_server(command_line: CommandLine, *options: str) -> Iterator[Server]:
    """Start a server on a free port and yield it when it is ready; end it afterwards."""
    process = command_line.start("serve", "--port", "0", *options)
    server = Server(process, [], threading.Condition())
    reader = threading.Thread(target=_read_lines, args=[server], daemon=True)
    reader.start()
    try:
        server.wait_for_line("serving ")
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        reader.join(WAIT_S)


def _read_lines(server: Server) -> None:
    assert server.process.stderr is not None
    # Popen's own stream is unbuffered here, and slow to read by lines.
    for line in os.fdopen(os.dup(server.process.stderr.fileno()), "rb"):
        with server.changed:
            server.lines.append(line.decode().rstrip("\n"))
            server.changed.notify_all()
    with server.changed:
        server.has_ended = True
        server.changed.notify_all()
