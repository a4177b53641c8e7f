"""Latency that the server adds to each token over the engine: 8 streams on two stages that sleep.

    python -m bench.serve_latency [--save]

An engine's token has a time of arrival. A reader of the engine has the token some time later; so has a client of the
server, which is a separate process. Both are measured with the same stages, and the difference of their medians and
of their 99th percentiles is what the server adds.
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
from collections.abc import Iterator
from contextlib import contextmanager

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
MAX_P50_MS, MAX_P99_MS = 1.0, 5.0


class TimedMetrics(Metrics):
    """Metrics that also keep the arrival of each token, by request."""

    def __init__(self, state: ServerState) -> None:
        super().__init__(state.records, state.activity, lambda: ())
        self.arrivals: dict[str, list[float]] = defaultdict(list)

    def add(self, record: RequestRecord, event: Event) -> None:
        """Count an event."""
        super().add(record, event)
        if isinstance(event, Token):
            self.arrivals[record.id].append(event.arrived_at)


@contextmanager
def sleeping(server: SteppedServer) -> Iterator[None]:
    """Let each stage sleep STEP_S for each of its plans, on a separate thread."""
    is_over = threading.Event()

    def work(rank: int) -> None:
        while not is_over.is_set():
            time.sleep(0.0005 if server.tokens.stages.next_step(rank) is None else STEP_S)
            server.tokens.stages.execute(rank)

    threads = [threading.Thread(target=work, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    yield
    is_over.set()
    for thread in threads:
        thread.join()


def engine_latencies(server: SteppedServer) -> list[float]:
    """Return the seconds from each token's arrival until a thread that reads the engine has it."""
    found: list[float] = []

    def read(number: int) -> None:
        handle = server.tokens.engine.submit(request(number, max_tokens=NUM_TOKENS, seed=number))
        found.extend(time.perf_counter() - event.arrived_at for event in handle.events() if isinstance(event, Token))

    threads = [threading.Thread(target=read, args=[number]) for number in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def server_latencies(server: SteppedServer, metrics: TimedMetrics) -> list[float]:
    """Return the seconds from each token's arrival until a client in another process has it."""
    command = [sys.executable, "-m", "bench.serve_latency", "--client", str(server.port)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found: list[float] = []
    for request_id, times in json.loads(ran.stdout).items():
        arrivals = metrics.arrivals[request_id.removeprefix("cmpl-")]
        assert len(times) == len(arrivals) > NUM_TOKENS // 2, (len(times), len(arrivals))
        found += [received - arrived for received, arrived in zip(times, arrivals, strict=True)]
    return found


def client(port: int) -> None:
    """Stream NUM_STREAMS answers at once; print the times at which each chunk with text came, by request."""
    found: dict[str, list[float]] = {}

    def stream(number: int) -> None:
        body = {"prompt": [number + 20], "seed": number, "max_tokens": NUM_TOKENS, "stream": True}
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(head.encode() + data)
            with connection.makefile("rb") as lines:
                for line in lines:
                    received = time.perf_counter()
                    if line.startswith(b"data: [DONE]"):
                        return
                    if line.startswith(b"data: {"):
                        chunk = json.loads(line[6:])
                        if chunk["choices"][0]["text"]:
                            found.setdefault(chunk["id"], []).append(received)

    threads = [threading.Thread(target=stream, args=[number]) for number in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(found))


def measured() -> tuple[float, float, float, float]:
    """Return p50 and p99 in ms of the engine, then of the server."""
    with stepped_server(ServerOptions(), num_slots=NUM_STREAMS, max_queued=NUM_STREAMS) as server, sleeping(server):
        metrics = TimedMetrics(server.state)
        server.state.metrics = metrics
        engine_latencies(server)
        both = [engine_latencies(server), server_latencies(server, metrics)]
    return tuple(  # type: ignore[return-value]
        1000 * value for found in both for value in (statistics.median(found), statistics.quantiles(found, n=100)[98])
    )


def main() -> int:
    """Measure and print; with --save append the row. Return 1 if the server adds more than allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="append the row to results/serve_latency.csv")
    parser.add_argument("--client", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client is not None:
        client(options.client)
        return 0
    row = [round(value, 3) for value in measured()]
    added = (row[2] - row[0], row[3] - row[1])
    print(
        f"engine p50 {row[0]} p99 {row[1]} ms, server p50 {row[2]} p99 {row[3]} ms: adds {added[0]:.3f} {added[1]:.3f}"
    )
    if options.save:
        save_rows("serve_latency", ("engine_p50_ms", "engine_p99_ms", "server_p50_ms", "server_p99_ms"), [row])
    return int(added[0] > MAX_P50_MS or added[1] > MAX_P99_MS)


if __name__ == "__main__":
    sys.exit(main())
