"""A real `mlx-k2 serve` process, and clients that speak HTTP over a plain socket."""

import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from openai import OpenAI

from tests.cli.command import CommandLine

WAIT_S = 60.0


@dataclass
class Server:
    """A server process, and the lines that it has written to stderr."""

    process: subprocess.Popen[bytes]
    lines: list[str]
    changed: threading.Condition
    has_ended: bool = False
    """True once stderr is closed."""

    @property
    def port(self) -> int:
        match = re.search(r":(\d+);", self.wait_for("listening on"))
        assert match
        return int(match[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> OpenAI:
        """The official client, without its own retries."""
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="any", max_retries=0, timeout=WAIT_S)

    def wait_for(self, text: str) -> str:
        """Wait for a line with ``text`` on stderr and return it."""

        def matching_line() -> str | None:
            return next((line for line in self.lines if text in line), None)

        with self.changed:
            self.changed.wait_for(lambda: matching_line() is not None or self.has_ended, WAIT_S)
            line = matching_line()
            assert line is not None, f"no {text!r} in {self.lines}"
            return line

    def stages(self) -> list[psutil.Process]:
        """Return the stage processes."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in children if "mlx_k2.stage.program" in process.cmdline()]

    def request(self, method: str, path: str, body: object = None, **headers: str) -> "HttpAnswer":
        """Send one request on a separate connection and return the complete answer."""
        return request_on(self.port, method, path, body, **headers)

    def connect(self) -> socket.socket:
        """Return a connection to the server, with a deadline."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)

    def end(self, signal_number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(signal_number)
        return self.process.wait(WAIT_S)


@dataclass(frozen=True)
class HttpAnswer:
    """The status, headers (names in lower case) and body of an answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of the body; all of its four fields are there."""
        error: dict[str, Any] = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert isinstance(error["type"], str)
        return error


def request_on(port: int, method: str, path: str, body: object = None, **headers: str) -> HttpAnswer:
    """Send one request on a separate connection and return the complete answer."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Host": "localhost", "Content-Length": str(len(data)), "Connection": "close"} | headers
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as connection:
        return exchange(connection, head.encode() + b"\r\n" + data)


def exchange(connection: socket.socket, data: bytes) -> HttpAnswer:
    """Send raw bytes and return the first answer, read until the server closes the connection."""
    with suppress(BrokenPipeError, ConnectionResetError):  # the server has answered already
        connection.sendall(data)
    received = b""
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            break
        if not part:
            break
        received += part
    return parse_answer(received)


def parse_answer(received: bytes) -> HttpAnswer:
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return HttpAnswer(int(status.split()[1]), headers, body)


@contextmanager
def serving(command_line: CommandLine, *options: str) -> Iterator[Server]:
    """Start a server on a free port and yield it when it is ready; end it afterwards."""
    process = command_line.start("serve", "--port", "0", *options)
    server = Server(process, [], threading.Condition())
    reader = threading.Thread(target=_read_lines, args=[server], daemon=True)
    reader.start()
    try:
        server.wait_for("serving ")
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
    for line in os.fdopen(os.dup(server.process.stderr.fileno()), "rb"):
        with server.changed:
            server.lines.append(line.decode().rstrip("\n"))
            server.changed.notify_all()
    with server.changed:
        server.has_ended = True
        server.changed.notify_all()


def home_of(folder: Path) -> CommandLine:
    """Return the command line of a user with a new home folder."""
    return CommandLine(folder)
