"""Latency that the server adds to each token of the engine, for 8 streams on two stages that sleep.

    python -m bench.serve_latency [--save]

Each token has the time at which the engine received it. Two latencies are measured from this time with the same stages:
until a thread that reads the engine has the token, and until a client of the server, in a separate process, has it. The
added latency is the second minus the first, of the medians and of the 99th percentiles. Exit code 1: one of the two
differences is larger than its limit, MAX_ADDED_P50_MS or MAX_ADDED_P99_MS.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from bench.measure import save_rows
from mlx_k2.coordinator.handle import Event, Token
from mlx_k2.server.metrics import Metrics
from mlx_k2.server.request_record import RequestRecord
from mlx_k2.server.server_state import ServerOptions, ServerState
from mlx_k2.testing.sleeping_stages import STEP_S
from tests.coordinator.token_engine import request
from tests.server.in_process import SteppedServer, stepped_server

NUM_STREAMS = 8
NUM_TOKENS = 200
POLL_INTERVAL_S = 0.0005
MAX_ADDED_P50_MS, MAX_ADDED_P99_MS = 1.0, 5.0


class Percentiles(NamedTuple):
    """Median and 99th percentile of latencies, in milliseconds."""

    p50: float
    p99: float


def percentiles(latencies_s: list[float]) -> Percentiles:
    """Return the percentiles of latencies in seconds."""
    values = (statistics.median(latencies_s), statistics.quantiles(latencies_s, n=100)[98])
    return Percentiles(*(round(1000 * value, 3) for value in values))


class TimedMetrics(Metrics):
    """Metrics that also record when the engine received each token, by request id."""

    def __init__(self, state: ServerState) -> None:
        super().__init__(state.records, state.activity, stage_totals=lambda: ())  # nobody reads the metrics
        self.arrivals: dict[str, list[float]] = defaultdict(list)

    def add(self, record: RequestRecord, event: Event) -> None:
        """Count an event; record a token's time."""
        super().add(record, event)
        if isinstance(event, Token):
            self.arrivals[record.id].append(event.arrived_at)


@contextmanager
def run_sleeping_stages(server: SteppedServer) -> Iterator[None]:
    """Run each stage on a thread that sleeps STEP_S for each plan, until exit."""
    is_over = threading.Event()

    def run_stage(rank: int) -> None:
        while not is_over.is_set():
            time.sleep(POLL_INTERVAL_S if server.harness.stages.next_step(rank) is None else STEP_S)
            server.harness.stages.execute(rank)

    threads = [threading.Thread(target=run_stage, args=[rank]) for rank in range(server.harness.limits.num_stages)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def engine_latencies(server: SteppedServer) -> list[float]:
    """Return the seconds from each token's arrival in the engine until a thread that reads the engine has it."""
    latencies_s: list[float] = []

    def read(number: int) -> None:
        handle = server.harness.engine.submit(request(number, max_tokens=NUM_TOKENS, seed=number))
        tokens = (event for event in handle.events() if isinstance(event, Token))
        latencies_s.extend(time.perf_counter() - token.arrived_at for token in tokens)

    run_streams(read)
    return latencies_s


def server_latencies(server: SteppedServer, metrics: TimedMetrics) -> list[float]:
    """Return the seconds from each token's arrival in the engine until a client in another process has it."""
    command = [sys.executable, "-m", "bench.serve_latency", "--client", str(server.port)]
    completed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    latencies_s: list[float] = []
    for request_id, receipts in json.loads(completed.stdout).items():
        arrivals = metrics.arrivals[request_id.removeprefix("cmpl-")]
        assert len(receipts) == len(arrivals) == NUM_TOKENS, (len(receipts), len(arrivals))
        latencies_s += [received_at - arrived_at for received_at, arrived_at in zip(receipts, arrivals, strict=True)]
    return latencies_s


def run_client(port: int) -> None:
    """Stream NUM_STREAMS answers at once; print as JSON the times at which chunks with text came, by request id."""
    receipts: dict[str, list[float]] = defaultdict(list)

    def stream(number: int) -> None:
        body = {"prompt": [number + 20], "seed": number, "max_tokens": NUM_TOKENS, "stream": True}
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(head.encode() + data)
            with connection.makefile("rb") as lines:
                for line in lines:
                    received_at = time.perf_counter()  # comparable with the engine's: one clock for all processes
                    if line.startswith(b"data: [DONE]"):
                        return
                    if line.startswith(b"data: {"):
                        chunk = json.loads(line[6:])
                        if chunk["choices"][0]["text"]:
                            receipts[chunk["id"]].append(received_at)

    run_streams(stream)
    print(json.dumps(receipts))


def run_streams(stream: Callable[[int], None]) -> None:
    """Call ``stream`` with the numbers of all streams, each on a thread; wait for the threads."""
    threads = [threading.Thread(target=stream, args=[number]) for number in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure() -> tuple[Percentiles, Percentiles]:
    """Return the percentiles of the engine's and of the server's latencies."""
    with (
        stepped_server(ServerOptions(), num_slots=NUM_STREAMS, max_queued=NUM_STREAMS) as server,
        run_sleeping_stages(server),
    ):
        metrics = TimedMetrics(server.state)
        server.state.metrics = metrics
        engine_latencies(server)  # not counted: the first run is slower
        return percentiles(engine_latencies(server)), percentiles(server_latencies(server, metrics))


def main() -> int:
    """Measure and print; with --save append a row to the CSV file. Return 1 if the added latency is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the row to results/serve_latency.csv")
    parser.add_argument("--client", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client is not None:
        run_client(options.client)
        return 0
    engine, server = measure()
    added = Percentiles(server.p50 - engine.p50, server.p99 - engine.p99)
    for name, (p50, p99) in (("engine", engine), ("server", server), ("added", added)):
        print(f"{name}: p50 {p50:.3f} ms, p99 {p99:.3f} ms")
    if options.save:
        header = ("engine_p50_ms", "engine_p99_ms", "server_p50_ms", "server_p99_ms")
        save_rows("serve_latency", header, [(*engine, *server)])
    return int(added.p50 > MAX_ADDED_P50_MS or added.p99 > MAX_ADDED_P99_MS)


if __name__ == "__main__":
    sys.exit(main())
