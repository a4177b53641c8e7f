"""Test of the server's resources: neither requests that end nor clients that hang up make them grow."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.cli.command import CommandLine
from tests.server.http_client import CHAT_PATH, exchange, request_bytes
from tests.server.in_process import wait_until
from tests.server.server_process import Server, running_server


def send_request(server: Server, number: int) -> None:
    """Send a request. Of ten clients, two hang up when the answer begins, one in the middle of its own request."""
    messages = [{"role": "user", "content": f"Count from {number}"}]
    request = request_bytes("POST", CHAT_PATH, {"messages": messages, "stream": number % 2 == 0, "max_tokens": 2})
    with server.connect() as connection:
        match number % 10:
            case 2 | 6:
                connection.sendall(request)
                assert connection.recv(64).startswith(b"HTTP/1.1 200")
            case 5:
                connection.sendall(request[:-20])
            case _:
                assert exchange(connection, request).status == 200


@dataclass(frozen=True)
class Resources:
    """Memory, threads and open files of a server process that has no requests."""

    num_bytes: int
    num_threads: int
    num_files: int


def idle_resources(server: Server) -> Resources:
    """Wait until no request runs, and return the server's resources."""
    wait_until(lambda: not server.request("GET", "/v1/status").json["requests"], "no request runs")
    process = psutil.Process(server.process.pid)
    return Resources(process.memory_info().rss, process.num_threads(), process.num_fds())


@pytest.mark.slow
def test_500_clients_need_no_more_memory_threads_and_files_than_100(tmp_path: Path) -> None:
    with running_server(CommandLine(tmp_path), "--max-sequences", "4") as server, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: send_request(server, number), range(100)))
        before = idle_resources(server)
        list(pool.map(lambda number: send_request(server, number), range(100, 500)))
        after = idle_resources(server)
    assert after.num_bytes < before.num_bytes + 5_000_000
    assert after.num_threads <= before.num_threads + 2  # the pool of worker threads grows to its limit
    assert after.num_files <= before.num_files + 4  # connections that the server has not closed yet
