"""Test of the server's memory: requests that end, and clients that hang up, leave nothing behind."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.server.server_process import Server, home_of, serving

CHAT = "/v1/chat/completions"


def run_client(server: Server, number: int) -> None:
    """Send a request. Of ten clients, two hang up after the headers, one after half of its body."""
    body = {"messages": [{"role": "user", "content": f"Count from {number}"}], "stream": number % 2 == 0}
    data = json.dumps(body | {"max_tokens": 2}).encode()
    if number % 10 not in (2, 5, 6):
        assert server.request("POST", CHAT, data).status == 200
        return
    with server.connect() as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        connection.sendall(head + (data[:20] if number % 10 == 5 else data))
        if number % 10 != 5:
            assert connection.recv(64).startswith(b"HTTP/1.1 200")


@pytest.mark.slow
def test_500_clients_need_no_more_memory_threads_and_files_than_100(tmp_path: Path) -> None:
    with serving(home_of(tmp_path), "--max-sequences", "4") as server, ThreadPoolExecutor(4) as pool:
        process = psutil.Process(server.process.pid)
        measurements = []
        for numbers in (range(100), range(100, 500)):
            list(pool.map(lambda number: run_client(server, number), numbers))
            status = server.request("GET", "/v1/status").json
            while status["requests"]:
                status = server.request("GET", "/v1/status").json
            measurements.append((process.memory_info().rss, process.num_threads(), process.num_fds()))
        (bytes_before, threads_before, files_before), (bytes_after, threads_after, files_after) = measurements
        assert bytes_after - bytes_before < 5_000_000
        assert threads_after <= threads_before + 2  # the pool of worker threads grows to its limit
        assert files_after <= files_before + 4  # connections that the server has not closed yet
