"""Two streams over three hosts, run from host 0, and the access to their stages that faults need."""

import json
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.emulated_hosts import two_streams
from tests.emulated_hosts.hosts import EmulatedHosts, wait_until

ROOT = Path(__file__).parents[2]
NUM_HOSTS = 3
LINE_S = 150.0
Line = dict[str, Any]


@dataclass
class StreamsRun:
    """The coordinator's process on host 0, and every line that it has written, with its time of arrival."""

    process: subprocess.Popen[bytes]
    lines: list[Line] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def until(self, **wanted: object) -> Line:
        """Read lines up to the first that has these keys and values, and return it. ``...`` matches any value."""
        while True:
            came_at, data = self._queue.get(timeout=LINE_S)
            assert data, f"it ended before {wanted}; its last lines: {self.lines[-3:]}"
            self.lines.append(json.loads(data))
            self.times.append(came_at)
            line = self.lines[-1]
            if all(key in line and value in (..., line[key]) for key, value in wanted.items()):
                return line

    def finish(self, timeout_s: float = LINE_S) -> None:
        """Read all remaining lines, to the end of the process."""
        deadline = time.monotonic() + timeout_s
        while self.process.returncode is None:
            came_at, data = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            if not data:
                self.process.wait(timeout=10)
                break
            self.lines.append(json.loads(data))
            self.times.append(came_at)

    def resume(self) -> None:
        """Resume the halted run."""
        assert self.process.stdin
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    @property
    def tokens(self) -> tuple[list[int], ...]:
        """Tokens of each stream so far."""
        return tuple(
            [line["token"] for line in self.lines if line.get("stream") == stream]
            for stream in range(len(two_streams.STREAMS))
        )

    @property
    def recorded(self) -> list[tuple[float, str]]:
        """Time and reason of each restart and, if the run ended with an error, of its end."""
        return [
            (at, line["error"] if "error" in line else line["restart"]["reason"])
            for at, line in zip(self.times, self.lines, strict=True)
            if line.keys() & {"restart", "error"}
        ]

    @property
    def reasons(self) -> list[str]:
        """Reasons of ``recorded``, without the times."""
        return [reason for _, reason in self.recorded]

    def _read(self) -> None:
        assert self.process.stdout
        for data in self.process.stdout:
            self._queue.put((time.monotonic(), data))
        self._queue.put((time.monotonic(), b""))


class FaultSetup:
    """A fresh folder for one fault: copies of the model and Pythons for single hosts, the hostfile, and logs."""

    def __init__(self, hosts: EmulatedHosts, model: Path, folder: Path) -> None:
        folder.mkdir()
        self.hosts = hosts
        self.folder = folder
        self.model = model
        self.log_dir = folder / "logs"
        self._more: dict[int, dict[str, object]] = {i: {} for i in range(NUM_HOSTS)}
        self._runs: list[StreamsRun] = []

    def own_model(self, i: int) -> Path:
        """Give host i its own copy of the model and return the copy's folder."""
        copy = self.folder / f"model-{i}"
        shutil.copytree(self.model, copy)
        self._more[i]["model"] = str(copy)
        return copy

    def on_host(self, i: int, **more: object) -> None:
        """Set further fields of host i in the hostfile."""
        self._more[i] |= more

    def start(self, options: Mapping[str, object], num_hosts: int = NUM_HOSTS) -> StreamsRun:
        """Start the streams over the first ``num_hosts`` hosts. ``options`` are two_streams.Options."""
        hostfile = self.folder / "hosts.json"
        entries = [
            {"ssh": self.hosts.names[i], "ips": [self.hosts.addresses[i]], **self._more[i]} for i in range(num_hosts)
        ]
        hostfile.write_text(json.dumps(entries))
        words = {"model": str(self.model), "hostfile": str(hostfile), "log_dir": str(self.log_dir), **options}
        process = self.hosts.exec(
            0,
            [sys.executable, "-m", "tests.emulated_hosts.two_streams", json.dumps(words)],
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

    def stage(self, i: int) -> psutil.Process:
        """Wait for the stage process (not its guard) on host i and return it."""
        return self._await(i, ("mlx_k2.stage.program",), ("tests.emulated_hosts.faulty_stage", " stage"))

    def guard(self, i: int) -> psutil.Process:
        """Return the guard of the stage on host i."""
        parent = self.stage(i).parent()
        assert parent is not None
        return parent

    def _await(self, i: int, *signs: Sequence[str]) -> psutil.Process:
        found: list[int] = []

        def look() -> bool:
            commands = self.hosts.processes(i).items()
            found[:] = [
                pid for pid, command in commands if any(all(word in command for word in all_) for all_ in signs)
            ]
            return bool(found)

        assert wait_until(look, 20), f"no stage on {self.hosts.names[i]}: {self.hosts.processes(i)}"
        return psutil.Process(found[0])

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
