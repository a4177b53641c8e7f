"""Load on `mlx-k2 serve` with clients that hang up and stages that are killed. Reports wrong streams and leaks.

    python -m bench.serve_load [--streams 64] [--kills 5] [--every 60] [--save]

A tiny random model runs on two local stages, with 8 slots and a queue of 64. Each client streams answers of fixed
seeds, and hangs up at random. A stage is killed ``--every`` seconds after the last restart was ready. Every complete
answer is compared with the one that an undisturbed server gave. At the end no request, descriptor or thread may be
left over.
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

NUM_KINDS = 12
MAX_TOKENS = 24
HANG_UP_FRACTION = 0.15
LONGEST_S = 120.0
_CHAT = "/v1/chat/completions"


@dataclass
class Totals:
    """Totals of a run. ``wrong``, ``failed`` and every count in ``left`` must stay 0."""

    complete: int = 0
    hung_up: int = 0
    refused: int = 0
    """Requests that came during a restart and were answered with 503."""
    wrong: int = 0
    failed: int = 0
    kills: int = 0
    left: Counter[str] = field(default_factory=Counter)


class _Refused(Exception):
    """The error for a request that came during a restart."""


def run(folder: Path, num_streams: int, num_kills: int, every_s: float, seed: int = 0) -> Totals:
    """Return the totals of ``num_streams`` clients during ``num_kills`` kills."""
    model = write_model(folder / "model")
    totals = Totals()
    options = ("--model", str(model), "--stages", "2", "--context", "400", "--max-queued", "64")
    with running_server(CommandLine(folder), *options) as server:
        start_workers(server)
        expected = [answer(server, kind, None) for kind in range(NUM_KINDS)]
        before = resources(server)
        run_clients(server, totals, expected, num_streams, num_kills, every_s, seed)
        after = resources(server)
    totals.left = Counter({name: max(0, count - before[name]) for name, count in after.items()})
    return totals


def start_workers(server: Server) -> None:
    """Send requests until the new server has all of asyncio's worker threads; each starts when the others are busy.

    One that starts during the kills would count as left over.
    """
    process = psutil.Process(server.process.pid)
    num_workers = min(32, (os.cpu_count() or 1) + 4)  # as many as asyncio starts at most
    num_threads = process.num_threads() + num_workers
    ends_at = time.monotonic() + LONGEST_S
    while process.num_threads() < num_threads:
        assert time.monotonic() < ends_at, "not all worker threads have started"
        clients = [threading.Thread(target=server.request, args=("GET", "/v1/model-files")) for _ in range(num_workers)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()


def run_clients(
    server: Server, totals: Totals, expected: list[str], num_streams: int, num_kills: int, every_s: float, seed: int
) -> None:
    """Run clients until the last killed stage has restarted, and each has then had one more answer."""
    is_over = threading.Event()
    lock = threading.Lock()

    def client(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        is_last = False
        while not is_last:
            is_last = is_over.is_set()
            kind = rng.randrange(NUM_KINDS)
            hang_up_after = rng.randrange(1, MAX_TOKENS) if rng.random() < HANG_UP_FRACTION and not is_last else None
            try:
                text = answer(server, kind, hang_up_after)
            except _Refused:
                with lock:
                    totals.refused += 1
                is_over.wait(0.2)
                is_last = False
                continue
            except (AssertionError, OSError) as error:
                print(f"failed: {error}", flush=True)
                with lock:
                    totals.failed += 1
                is_over.wait(1)
                continue
            with lock:
                totals.hung_up += hang_up_after is not None
                totals.complete += hang_up_after is None
                totals.wrong += hang_up_after is None and text != expected[kind]

    threads = [threading.Thread(target=client, args=[number], daemon=True) for number in range(num_streams)]
    for thread in threads:
        thread.start()
    rng = random.Random(seed)
    try:
        for _ in range(num_kills):
            is_over.wait(every_s)
            restarts = status(server)["restarts"]
            rng.choice(server.stages()).kill()
            totals.kills += 1
            wait_for_restart(server, restarts + 1)
            print(f"{totals}", flush=True)
    finally:
        is_over.set()
    for thread in threads:
        thread.join(LONGEST_S)
        assert not thread.is_alive(), "a client has no answer"


def answer(server: Server, kind: int, hang_up_after: int | None) -> str:
    """Return the text of a streamed answer; hang up after ``hang_up_after`` chunks with text."""
    message = {"role": "user", "content": f"{kind} " * (4 + 5 * kind)}
    body = json.dumps({"messages": [message], "seed": kind, "max_tokens": MAX_TOKENS, "stream": True}).encode()
    head = f"POST {_CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    text, num_chunks = "", 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=LONGEST_S) as connection:
        connection.sendall(head.encode() + body)
        with closing(connection.makefile("rb")) as lines:
            first = lines.readline()
            if b" 503 " in first:
                raise _Refused
            assert b" 200 " in first, first
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


def status(server: Server) -> dict[str, Any]:
    """Return the server's status."""
    found: dict[str, Any] = server.request("GET", "/v1/status").json
    return found


def wait_for_restart(server: Server, num_restarts: int) -> None:
    """Wait until the stages are ready after restart number ``num_restarts``."""
    ends_at = time.monotonic() + LONGEST_S
    while status(server)["restarts"] != num_restarts:
        assert time.monotonic() < ends_at, "no restart"
        time.sleep(0.1)


def resources(server: Server) -> Counter[str]:
    """Return the counts of what the server process holds, once no request runs."""
    ends_at = time.monotonic() + LONGEST_S
    while status(server)["requests"] and time.monotonic() < ends_at:
        time.sleep(0.05)
    process = psutil.Process(server.process.pid)
    time.sleep(0.2)  # the connections of the last clients are closed
    return Counter(
        requests=len(status(server)["requests"]),
        descriptors=process.num_fds(),
        threads=process.num_threads(),
        processes=len(process.children(recursive=True)),
    )


def main() -> int:
    """Run and print; with --save append the totals. Return 1 if a stream was wrong or failed, or something is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--every", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="append the totals to results/serve_load.csv")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="serve-load-") as folder:
        totals = run(Path(folder), options.streams, options.kills, options.every, options.seed)
    print(totals)
    if options.save:
        header = ("streams", "kills", "every_s", "complete", "hung_up", "refused", "wrong", "failed", "left")
        counts = (totals.complete, totals.hung_up, totals.refused, totals.wrong, totals.failed, totals.left.total())
        save_rows("serve_load", header, [(options.streams, totals.kills, options.every, *counts)])
    return int(totals.wrong > 0 or totals.failed > 0 or totals.left.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
