"""Soak test: streams of mixed lengths on tiny local stages with a random fault at intervals. Reports errors and leaks.

    python -m bench.soak --minutes 60 --fault-every 60
    python -m bench.soak --restarts 200

Each stream's tokens are compared with those of a run without faults. At the end there may not be more descriptors,
threads, processes or temporary files than before. Exit code 1: tokens differ, or a resource leaked. Needs Linux.
"""

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.measure import save_rows
from mlx_k2.coordinator.engine import Engine, engine_on
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.deployment.restarting import WAITING, Restart, RestartingDeployment
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.request import Request
from mlx_k2.weights.checkpoint import describe_model
from mlx_k2.weights.model_files import read_model_files
from tests.local_cluster import (
    is_running,
    local_request,
    marked_host,
    request,
    stage_process,
    together,
    write_model,
)

NUM_STAGES = 3
STALL_TIMEOUT_S = 2.0
UNLIMITED_RESTARTS = 10**9
MUST_NOT_GROW = ("descriptors", "threads", "temporary")
"""Resources that are compared while the stages run. Processes are compared after the stages have ended."""
REQUESTS = tuple(request(length, 40, seed=length) for length in (3, 150, 40, 8, 90))


@dataclass
class Totals:
    """Totals of a soak run. ``wrong`` and each count in ``leaked`` must stay 0."""

    streams: int = 0
    """Streams whose tokens were compared. ``tokens`` also counts the runs before the first and after the last fault."""
    tokens: int = 0
    wrong: int = 0
    """Streams whose tokens differ from those of the run without faults."""
    faults: Counter[str] = field(default_factory=Counter)
    restarts: list[Restart] = field(default_factory=list)
    longest_pause_s: float = 0.0
    """Longest time without a token of any stream."""
    leaked: Counter[str] = field(default_factory=Counter)


def inject_fault(rng: random.Random) -> str:
    """Inject one random fault into one random stage or its guard; return the fault's name."""
    rank = rng.randrange(NUM_STAGES)
    stage = stage_process(rank)
    guard = stage.parent()
    faults: dict[str, Callable[[], None]] = {
        "stage killed": stage.kill,
        "stage stopped": stage.suspend,
        "stage terminated": stage.terminate,
    }
    if guard is not None:
        faults["guard killed"] = guard.kill
    name = rng.choice(sorted(faults))
    faults[name]()
    return name


class FaultInjector:
    """Thread that injects a random fault every ``every_s`` seconds until it is closed."""

    def __init__(self, every_s: float, seed: int, totals: Totals) -> None:
        self._every_s = every_s
        self._rng = random.Random(seed)
        self._totals = totals
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop injecting faults, and wait for the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        tokens = self._totals.tokens
        while not self._closing.wait(self._every_s):
            if self._totals.tokens == tokens:  # no token since the last fault: its restart is not over
                continue
            tokens = self._totals.tokens
            try:
                self._totals.faults[inject_fault(self._rng)] += 1
            except (ValueError, psutil.NoSuchProcess):  # `stage_process` finds no stage during a restart
                self._totals.faults["came during a restart"] += 1


def soak(folder: Path, minutes: float, num_restarts: int, fault_every_s: float, seed: int) -> Totals:
    """Run REQUESTS again and again until ``minutes`` have passed or ``num_restarts`` restarts have happened."""
    model = write_model(folder / "model")
    hosts = [marked_host(folder, rank, sys.executable) for rank in range(NUM_STAGES)]
    deployment_request = local_request(model, hosts).with_options(stall_timeout_s=STALL_TIMEOUT_S)
    description = describe_model(read_model_files(deployment_request.source).files, str(model))
    totals = Totals()
    earlier_processes = psutil.Process().children(recursive=True)  # of tests that ran before in this process

    def on_restart(restart: Restart, phase: str) -> None:
        if phase == WAITING:
            totals.restarts.append(restart)

    with (
        RestartingDeployment(
            deployment_request, description, DeploymentListener(), UNLIMITED_RESTARTS, first_wait_s=0.0
        ) as restarting,
        engine_on(
            restarting.deployment, draft_mode=DraftMode.AUTO, restarts=restarting, on_restart=on_restart
        ) as engine,
    ):
        expected = _run_requests(engine, totals)
        before = _resources()
        ends_at = time.monotonic() + 60 * minutes
        with closing(FaultInjector(fault_every_s, seed, totals)):
            while time.monotonic() < ends_at and len(totals.restarts) < num_restarts:
                for stream, tokens in _run_requests(engine, totals).items():
                    totals.streams += 1
                    totals.wrong += tokens != expected[stream]
                _print_progress(totals, _resources())
        _run_requests(engine, totals)  # after a fault that came last, this returns only when the stages have restarted
        after = _resources()
    children = psutil.Process().children(recursive=True)
    leaked_processes = [process for process in children if process not in earlier_processes and is_running(process)]
    totals.leaked = Counter({name: max(0, after[name] - before[name]) for name in MUST_NOT_GROW})
    totals.leaked["processes"] = len(leaked_processes)
    print(f"before {before}\nafter  {after}\nleaked {dict(totals.leaked)}")
    return totals


def _run_requests(engine: Engine, totals: Totals) -> dict[Request, list[int]]:
    """Run REQUESTS at the same time; return the token ids of each, and update ``totals``."""
    tokens: dict[Request, list[int]] = {stream: [] for stream in REQUESTS}
    last = time.monotonic()
    for stream, token in together(engine, *REQUESTS):
        totals.longest_pause_s = max(totals.longest_pause_s, time.monotonic() - last)
        last = time.monotonic()
        totals.tokens += 1
        tokens[stream].append(token.token_id)
    return tokens


def _resources() -> dict[str, int]:
    """Return this process's numbers of descriptors, threads, KiB of memory, descendants and temporary files."""
    process = psutil.Process()
    return {
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "resident_kb": process.memory_info().rss // 1024,
        "descendants": len(process.children(recursive=True)),
        "temporary": len(list(Path(tempfile.gettempdir()).iterdir())),
    }


def _print_progress(totals: Totals, resources: dict[str, int]) -> None:
    print(
        f"streams {totals.streams} wrong {totals.wrong} restarts {len(totals.restarts)} "
        f"longest pause {totals.longest_pause_s:.1f} s {resources}",
        flush=True,
    )


def main() -> int:
    """Run and print; with --save append the totals to the CSV file. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="end after this time  [default: 60]")
    parser.add_argument("--restarts", type=int, default=UNLIMITED_RESTARTS, help="end after this number of restarts")
    parser.add_argument(
        "--fault-every", type=float, default=60.0, metavar="SECONDS", help="time between two faults  [default: 60]"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of faults  [default: 0]")
    parser.add_argument("--save", action="store_true", help="append the totals to results/soak.csv")
    options = parser.parse_args()
    started_at = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, tempfile.TemporaryDirectory(prefix="soak-") as temp:
        os.environ["TMPDIR"] = tempfile.tempdir = temp  # only this process and its stages use this folder
        totals = soak(Path(folder), options.minutes, options.restarts, options.fault_every, options.seed)
    minutes = (time.monotonic() - started_at) / 60
    for name, count in sorted(totals.faults.items()):
        print(f"{count:5} {name}")
    if options.save:
        counts = (sum(totals.faults.values()), len(totals.restarts), totals.streams, totals.tokens, totals.wrong)
        header = ("minutes", "faults", "restarts", "streams", "tokens", "wrong", "longest_pause_s")
        save_rows("soak", header, [(f"{minutes:.1f}", *counts, f"{totals.longest_pause_s:.1f}")])
    return int(totals.wrong > 0 or totals.leaked.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
