"""Load test of `mlx-k2 serve`, with clients that hang up and stages that are killed. Reports wrong answers and leaks.

    python -m bench.serve_load [--streams 64] [--kills 5] [--every 60] [--save]

A tiny random model runs on two local stages, with 8 slots and a queue of 64 requests. Each client streams answers to
prompts that it chooses from 12, and hangs up at random. A prompt always has the same seed. A stage is killed
``--every`` seconds after the last restart. Each complete answer is compared with the answer to the same prompt before
the load. At the end the server may not have more requests, descriptors, threads or processes than before the load. Exit
code 1: an answer was wrong, a client failed, or something leaked.
"""

import argparse
import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.measure import save_rows
from tests.cli.command import CommandLine
from tests.local_cluster import write_model
from tests.server.server_process import Server, running_server

NUM_PROMPTS = 12
MAX_TOKENS = 24
HANG_UP_FRACTION = 0.15
TIMEOUT_S = 120.0


@dataclass
class Totals:
    """Counts of answers and kills. ``wrong``, ``failed`` and each count in ``leaked`` must stay 0."""

    complete: int = 0
    hung_up: int = 0
    """Includes answers that ended before the client would have hung up."""
    refused: int = 0
    """Requests during a restart, which get the status 503."""
    wrong: int = 0
    failed: int = 0
    kills: int = 0
    leaked: Counter[str] = field(default_factory=Counter)


class _RefusedError(Exception):
    """The server's status 503, the answer to a request during a restart."""


def run(folder: Path, num_streams: int, num_kills: int, every_s: float, seed: int = 0) -> Totals:
    """Run ``num_streams`` clients during ``num_kills`` kills, each ``every_s`` seconds after the last restart."""
    model = write_model(folder / "model")
    totals = Totals()
    options = ("--model", str(model), "--stages", "2", "--context", "400", "--max-queued", "64")
    with running_server(CommandLine(folder), *options) as server:
        start_server_threads(server)
        expected = [request_answer(server, number, None) for number in range(NUM_PROMPTS)]
        before = resources(server)
        run_clients(server, totals, expected, num_streams, num_kills, every_s, seed)
        after = resources(server)
    totals.leaked = Counter({name: max(0, count - before[name]) for name, count in after.items()})
    return totals


def start_server_threads(server: Server) -> None:
    """Send requests until the server has all of asyncio's worker threads: one starts when all others are busy.

    A worker thread that starts during the load would count as leaked.
    """
    process = psutil.Process(server.process.pid)
    num_workers = min(32, (os.cpu_count() or 1) + 4)  # the maximum of asyncio
    num_threads = process.num_threads() + num_workers
    ends_at = time.monotonic() + TIMEOUT_S
    while process.num_threads() < num_threads:
        assert time.monotonic() < ends_at, "not all worker threads have started"
        # a worker thread answers this path
        clients = [threading.Thread(target=server.request, args=("GET", "/v1/model-files")) for _ in range(num_workers)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()


def run_clients(
    server: Server, totals: Totals, expected: list[str], num_streams: int, num_kills: int, every_s: float, seed: int
) -> None:
    """Run clients until the last killed stage has restarted, and each client's next request was answered or failed."""
    is_over = threading.Event()
    lock = threading.Lock()

    def client(client_number: int) -> None:
        rng = random.Random(f"{seed} {client_number}")
        is_last = False
        while not is_last:
            is_last = is_over.is_set()
            number = rng.randrange(NUM_PROMPTS)
            hangs_up = rng.random() < HANG_UP_FRACTION and not is_last
            try:
                text = request_answer(server, number, rng.randrange(1, MAX_TOKENS) if hangs_up else None)
            except _RefusedError:
                with lock:
                    totals.refused += 1
                is_over.wait(0.2)
                is_last = False  # the last request, too, is repeated until it is answered
                continue
            except (AssertionError, OSError) as error:
                print(f"failed: {error}", flush=True)
                with lock:
                    totals.failed += 1
                is_over.wait(1)
                continue
            with lock:
                if hangs_up:
                    totals.hung_up += 1
                else:
                    totals.complete += 1
                    totals.wrong += text != expected[number]

    threads = [threading.Thread(target=client, args=[number], daemon=True) for number in range(num_streams)]
    for thread in threads:
        thread.start()
    rng = random.Random(seed)
    try:
        for _ in range(num_kills):
            time.sleep(every_s)
            num_restarts = server_status(server)["restarts"]
            rng.choice(server.stages()).kill()
            totals.kills += 1
            wait_for_restart(server, num_restarts + 1)
            print(totals, flush=True)
    finally:
        is_over.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), f"a client had no answer in {TIMEOUT_S:.0f} s"


def request_answer(server: Server, number: int, hang_up_after: int | None) -> str:
    """Return the text of the streamed answer to prompt number ``number``.

    With ``hang_up_after``, hang up after at most that number of chunks with text, and return their text.
    """
    message = {"role": "user", "content": f"{number} " * (4 + 5 * number)}
    body = json.dumps({"messages": [message], "seed": number, "max_tokens": MAX_TOKENS, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    text, num_chunks = "", 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(head.encode() + body)
        with closing(connection.makefile("rb")) as lines:
            status_line = lines.readline()
            if b" 503 " in status_line:
                raise _RefusedError
            assert b" 200 " in status_line, status_line
            for line in lines:
                assert b'"error"' not in line, line
                if line == b"data: [DONE]\n":
                    return text
                if line.startswith(b"data: {"):
                    delta = json.loads(line[6:])["choices"][0]["delta"]
                    added: str = delta.get("content", "") + delta.get("reasoning_content", "")
                    text += added
                    num_chunks += bool(added)
                    if num_chunks == hang_up_after:
                        return text
    raise AssertionError("the stream ended without its last event")


def server_status(server: Server) -> dict[str, Any]:
    """Return the server's answer to GET /v1/status."""
    status: dict[str, Any] = server.request("GET", "/v1/status").json
    return status


def wait_for_restart(server: Server, num_restarts: int) -> None:
    """Wait until the stages are ready after restart number ``num_restarts``."""
    ends_at = time.monotonic() + TIMEOUT_S
    while server_status(server)["restarts"] != num_restarts:
        assert time.monotonic() < ends_at, f"no restart in {TIMEOUT_S:.0f} s"
        time.sleep(0.1)


def resources(server: Server) -> Counter[str]:
    """Wait until no request runs, at most TIMEOUT_S; return the counts of the server process's resources."""
    ends_at = time.monotonic() + TIMEOUT_S
    while server_status(server)["requests"] and time.monotonic() < ends_at:
        time.sleep(0.05)
    process = psutil.Process(server.process.pid)
    time.sleep(0.2)  # time for the server to close the connections of the last clients
    return Counter(
        requests=len(server_status(server)["requests"]),
        descriptors=process.num_fds(),
        threads=process.num_threads(),
        processes=len(process.children(recursive=True)),
    )


def main() -> int:
    """Run and print; with --save append the totals to the CSV file. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64, help="number of clients  [default: 64]")
    parser.add_argument("--kills", type=int, default=5, help="number of killed stages  [default: 5]")
    parser.add_argument(
        "--every",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="time from a restart to the next kill  [default: 60]",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the clients' choices  [default: 0]")
    parser.add_argument("--save", action="store_true", help="append the totals to results/serve_load.csv")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="serve-load-") as folder:
        totals = run(Path(folder), options.streams, options.kills, options.every, options.seed)
    print(totals)
    if options.save:
        header = ("streams", "kills", "every_s", "complete", "hung_up", "refused", "wrong", "failed", "leaked")
        counts = (totals.complete, totals.hung_up, totals.refused, totals.wrong, totals.failed, totals.leaked.total())
        save_rows("serve_load", header, [(options.streams, totals.kills, options.every, *counts)])
    return int(totals.wrong > 0 or totals.failed > 0 or totals.leaked.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
