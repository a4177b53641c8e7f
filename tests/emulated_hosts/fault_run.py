"""Two streams over three hosts, started on host 0, and the access to processes and files that faults need."""

import json
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.emulated_hosts import two_streams
from tests.emulated_hosts.hosts import EmulatedHosts, wait_until

ROOT = Path(__file__).parents[2]
NUM_HOSTS = 3
LINE_TIMEOUT_S = 150.0
Line = dict[str, Any]
"""One JSON object that two_streams.py writes."""
ANY = ...
"""The value that ``StreamsRun.until`` takes for any value."""


@dataclass
class StreamsRun:
    """A process of two_streams.py on host 0, and the lines of its stdout with their times of arrival."""

    process: subprocess.Popen[bytes]
    lines: list[Line] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def until(self, **wanted: object) -> Line:
        """Read lines up to the first that has these keys and values, and return it."""
        while True:
            line = self._next_line(LINE_TIMEOUT_S)
            assert line is not None, f"it ended before {wanted}; its last lines: {self.lines[-3:]}"
            if all(key in line and value in (ANY, line[key]) for key, value in wanted.items()):
                return line

    def finish(self) -> None:
        """Read the remaining lines and wait for the end of the process."""
        deadline = time.monotonic() + LINE_TIMEOUT_S
        while self.process.returncode is None:
            if self._next_line(max(0.0, deadline - time.monotonic())) is None:
                self.process.wait(timeout=10)

    def _next_line(self, timeout_s: float) -> Line | None:
        """Wait for the next line, record it and return it; None at the end of stdout."""
        arrived_at, data = self._queue.get(timeout=timeout_s)
        if not data:
            return None
        self.lines.append(json.loads(data))
        self.times.append(arrived_at)
        return self.lines[-1]

    def resume(self) -> None:
        """Resume the halted run."""
        assert self.process.stdin
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    @property
    def tokens(self) -> tuple[list[int], ...]:
        """The tokens of each stream so far."""
        return tuple(
            [line["token"] for line in self.lines if line.get("stream") == stream]
            for stream in range(len(two_streams.STREAMS))
        )

    @property
    def reasons(self) -> list[str]:
        """The reason of each restart and, if the run ended with an error, that error."""
        restarts_and_error = [line for line in self.lines if line.keys() & {"restart", "error"}]
        return [line["error"] if "error" in line else line["restart"]["reason"] for line in restarts_and_error]

    @property
    def reason_times(self) -> list[float]:
        """The time of arrival of each of ``reasons``."""
        return [at for at, line in zip(self.times, self.lines, strict=True) if line.keys() & {"restart", "error"}]

    def _read(self) -> None:
        assert self.process.stdout
        for data in self.process.stdout:
            self._queue.put((time.monotonic(), data))
        self._queue.put((time.monotonic(), b""))


class FaultSetup:
    """The hosts, and a folder for one fault: hostfile, logs, and copies of the model for single hosts."""

    def __init__(self, hosts: EmulatedHosts, model: Path, folder: Path) -> None:
        folder.mkdir()
        self.hosts = hosts
        self.folder = folder
        self.model = model
        self.log_dir = folder / "logs"
        self._entries: list[dict[str, object]] = [
            {"ssh": name, "ips": [address]} for name, address in zip(hosts.names, hosts.addresses, strict=True)
        ]
        self._runs: list[StreamsRun] = []

    def copy_model(self, rank: int) -> Path:
        """Give a host its own copy of the model and return the folder of the copy."""
        copy = self.folder / f"model-{rank}"
        shutil.copytree(self.model, copy)
        self.on_host(rank, model=str(copy))
        return copy

    def on_host(self, rank: int, **fields: object) -> None:
        """Set fields of a host in the hostfile."""
        self._entries[rank] |= fields

    def start(self, options: Mapping[str, object], num_hosts: int = NUM_HOSTS) -> StreamsRun:
        """Start the streams over the first ``num_hosts`` hosts. ``options`` are two_streams.Options."""
        hostfile = self.folder / "hosts.json"
        hostfile.write_text(json.dumps(self._entries[:num_hosts]))
        all_options = {"model": str(self.model), "hostfile": str(hostfile), "log_dir": str(self.log_dir), **options}
        process = self.hosts.exec(
            0,
            [sys.executable, "-m", "tests.emulated_hosts.two_streams", json.dumps(all_options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "stderr").open("wb"),
            cwd=ROOT,
        )
        self._runs.append(StreamsRun(process))
        return self._runs[-1]

    def close(self) -> None:
        """Kill every run that has not ended."""
        for run in self._runs:
            if run.process.poll() is None:
                run.process.kill()
                run.process.wait()

    def stage(self, rank: int) -> psutil.Process:
        """Wait for the process of a stage that is not of faulty_stage.py, and return it."""
        pids: list[int] = []

        def find_stage() -> bool:
            commands = self.hosts.processes(rank)
            pids[:] = [pid for pid, command in commands.items() if "mlx_k2.stage.program" in command]
            return bool(pids)

        assert wait_until(find_stage, 20), f"no stage on {self.hosts.names[rank]}: {self.hosts.processes(rank)}"
        return psutil.Process(pids[0])

    def guard(self, rank: int) -> psutil.Process:
        """Return the guard of a stage."""
        guard = self.stage(rank).parent()
        assert guard is not None
        return guard

    def report(self) -> str:
        """Return the last report in the logs."""
        reports = sorted(self.log_dir.glob("report-*.txt"), key=lambda path: path.stat().st_mtime_ns)
        assert reports, f"no report in {self.log_dir}"
        return reports[-1].read_text()


def undisturbed(hosts: EmulatedHosts, model: Path, folder: Path) -> tuple[list[int], ...]:
    """Return the tokens of both streams without a fault, with one stage on one host."""
    setup = FaultSetup(hosts, model, folder)
    run = setup.start({}, num_hosts=1)
    run.finish()
    assert run.lines[-1] == {"ended": True}, run.lines[-1]
    return run.tokens
