"""Actions of the fault matrix: they prepare, cause, check and undo faults.

Each takes a setup and, except for preparations, its running streams. An action that causes a fault returns when the
fault began (time.monotonic), or None if it began at the return.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.emulated_hosts import faulty_stage
from tests.emulated_hosts.fault_run import NUM_HOSTS, FaultSetup, StreamsRun
from tests.emulated_hosts.hosts import wait_until

MIDDLE = 1
SLOW_KILOBITS = 1000
STOPPED_S = 30.0
RING_PORT = 41001
CLOCK_SOURCE = Path(__file__).with_name("jumping_clock.cc")


def kill(rank: int) -> Callable[[FaultSetup, StreamsRun], float]:
    def cause(setup: FaultSetup, run: StreamsRun) -> float:
        stage = setup.stage(rank)
        began = time.monotonic()
        stage.kill()
        return began

    return cause


def kill_and_resume(rank: int) -> Callable[[FaultSetup, StreamsRun], float]:
    """Return an action for a halted run: kill the stage as soon as it exists, then resume the run."""

    def cause(setup: FaultSetup, run: StreamsRun) -> float:
        stage = setup.stage(rank)
        began = time.monotonic()
        stage.kill()
        run.resume()
        return began

    return cause


def kill_twice(rank: int, halted_in: str) -> Callable[[FaultSetup, StreamsRun], float]:
    """Return an action that kills stage 0 and, during the restart, stage ``rank`` in the phase ``halted_in``."""

    def cause(setup: FaultSetup, run: StreamsRun) -> float:
        setup.stage(0).kill()
        run.until(phase=halted_in, time=2)
        return kill_and_resume(rank)(setup, run)

    return cause


def stop(setup: FaultSetup, run: StreamsRun) -> None:
    setup.stage(MIDDLE).suspend()


def kill_guard(setup: FaultSetup, run: StreamsRun) -> float:
    guard = setup.guard(MIDDLE)
    began = time.monotonic()
    guard.kill()
    return began


def cut(setup: FaultSetup, run: StreamsRun) -> None:
    setup.hosts.cut(MIDDLE)


def cut_until_detected(setup: FaultSetup, run: StreamsRun) -> float:
    """Pull the middle host's cable, and plug it in again after the stage there has ended by its lease."""
    setup.hosts.cut(MIDDLE)
    began = time.monotonic()
    run.until(restart=...)
    assert wait_until(lambda: not setup.hosts.processes(MIDDLE), 30)
    setup.hosts.restore(MIDDLE)
    return began


def cut_for_two_seconds(setup: FaultSetup, run: StreamsRun) -> None:
    setup.hosts.cut(MIDDLE)
    time.sleep(2)
    setup.hosts.restore(MIDDLE)


def cut_data(setup: FaultSetup, run: StreamsRun) -> float:
    """Pull the cable of the hidden states, while ssh uses another one, until the restart."""
    setup.hosts.cut(MIDDLE, "eth1")
    began = time.monotonic()
    run.until(restart=...)
    setup.hosts.restore(MIDDLE, "eth1")
    return began


def restore(setup: FaultSetup, run: StreamsRun) -> None:
    setup.hosts.restore(MIDDLE)


def data_cables(setup: FaultSetup) -> None:
    for i in range(NUM_HOSTS):
        setup.on_host(i, ips=[setup.hosts.data_addresses[i]])


def slow(setup: FaultSetup, run: StreamsRun) -> None:
    setup.hosts.slow(MIDDLE, SLOW_KILOBITS)


def check_was_slow(setup: FaultSetup, run: StreamsRun) -> None:
    assert setup.hosts.num_delayed_packets(MIDDLE) > 100


def end_sshd(setup: FaultSetup, run: StreamsRun) -> float:
    began = time.monotonic()
    setup.hosts.end_sshd(MIDDLE)
    run.until(restart=...)
    setup.hosts.start_sshd(MIDDLE)
    return began


def no_memory(setup: FaultSetup, run: StreamsRun) -> float:
    """Limit the middle stage's address space to its present size, just before it loads."""
    stage = setup.stage(MIDDLE)
    space = stage.memory_info().vms
    resource.prlimit(stage.pid, resource.RLIMIT_AS, (space, space))
    run.resume()
    return time.monotonic()


def no_memory_in_restart(setup: FaultSetup, run: StreamsRun) -> float:
    setup.stage(0).kill()
    run.until(phase="loading", time=2)
    return no_memory(setup, run)


def fault_inside(name: str) -> Callable[[FaultSetup, StreamsRun], None]:
    return lambda setup, _: faulty_stage.request_fault(setup.folder / "faulty", name)


def faulty_middle(setup: FaultSetup) -> None:
    setup.on_host(MIDDLE, python=faulty_stage.faulty_python(setup.folder / "faulty"))


def printing_shell(setup: FaultSetup) -> None:
    (setup.hosts.homes[MIDDLE] / ".bashrc").write_text("echo welcome; echo have fun\n")


def check_shell_output(setup: FaultSetup, run: StreamsRun) -> None:
    (setup.hosts.homes[MIDDLE] / ".bashrc").unlink()
    assert "its login shell prints" in (setup.log_dir / "stages.log").read_text()


def nothing(setup: FaultSetup, run: StreamsRun) -> None:
    pass


def kill_coordinator(setup: FaultSetup, run: StreamsRun) -> None:
    run.process.kill()


def stop_coordinator(setup: FaultSetup, run: StreamsRun) -> float:
    """Suspend the coordinator for longer than the lease. The stages end, and all restart after it resumes."""
    coordinator = psutil.Process(run.process.pid)
    coordinator.suspend()
    time.sleep(STOPPED_S)
    assert not any(
        "mlx_k2.stage" in command for command in setup.hosts.all_processes().values() if "ssh" not in command
    )
    coordinator.resume()
    return time.monotonic()


def small_disk(setup: FaultSetup) -> None:
    setup.log_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", setup.log_dir], check=True)


def check_full_disk(setup: FaultSetup, run: StreamsRun) -> None:
    subprocess.run(["umount", setup.log_dir], check=True)
    assert any("No space left on device" in line.get("notify", "") for line in run.lines)


def own_model(setup: FaultSetup) -> None:
    setup.own_model(MIDDLE)


def truncated(setup: FaultSetup) -> None:
    """Cut off the second half of a file that the middle stage loads."""
    _truncate(setup.own_model(MIDDLE))


def _truncate(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[len(list(model.glob("*.safetensors"))) // 2]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)


def truncate_and_kill(setup: FaultSetup, run: StreamsRun) -> float:
    _truncate(setup.folder / f"model-{MIDDLE}")
    return kill(MIDDLE)(setup, run)


def fixed_ports(setup: FaultSetup) -> None:
    for i in range(NUM_HOSTS):
        setup.on_host(i, ips=[f"{setup.hosts.addresses[i]}:{RING_PORT + i}"])


OTHER_PROCESS = """
import os, socket, sys, time
print("ready", flush=True)
while True:
    try:
        peer = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1)
        break
    except OSError:
        pass
peer.sendall(os.urandom(100))
time.sleep(5)
"""


def connect_another_process(setup: FaultSetup, run: StreamsRun) -> float:
    """Connect another process to the middle stage's ring port before its neighbour does, during a restart."""
    setup.stage(0).kill()
    run.until(phase="connecting", time=2)
    command = [sys.executable, "-c", OTHER_PROCESS, setup.hosts.addresses[MIDDLE], str(RING_PORT + MIDDLE)]
    peer = setup.hosts.exec(2, command, stdout=subprocess.PIPE)
    assert peer.stdout is not None
    assert peer.stdout.readline() == b"ready\n"  # from here on it tries to connect without a pause
    began = time.monotonic()
    run.resume()
    run.until(restart=...)
    peer.kill()
    peer.wait()
    peer.stdout.close()
    return began


def jumping_clock(setup: FaultSetup) -> None:
    """Add the offset in a file, in seconds, to the middle stage's wall clock."""
    library = setup.folder / "clock.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(CLOCK_SOURCE), "-o", str(library), "-ldl"], check=True)
    (setup.folder / "clock").write_text("0\n")
    python = setup.folder / "python-with-offset-clock"
    faulty = faulty_stage.faulty_python(setup.folder / "faulty")
    python.write_text(f"#!/bin/sh\nLD_PRELOAD={library} CLOCK_OFFSET={setup.folder / 'clock'} exec {faulty}\n")
    python.chmod(0o755)
    setup.on_host(MIDDLE, python=str(python))


def jump(setup: FaultSetup, run: StreamsRun) -> None:
    """Set the middle stage's wall clock one day ahead, then one year back."""
    reports = setup.folder / "faulty" / "clock-report"
    for offset_s in (86_400, -31_536_000):
        (setup.folder / "clock").write_text(f"{offset_s}\n")
        faulty_stage.request_fault(setup.folder / "faulty", "clock")
        assert wait_until(lambda: reports.exists() and bool(reports.read_text()), 20), "no step since the clock jumped"
        assert abs(float(reports.read_text()) - time.time() - offset_s) < 60, "the clock did not jump"
        reports.unlink()


def second_run(setup: FaultSetup, run: StreamsRun) -> None:
    """Run the same streams a second time, on the same hosts at the same time."""
    other = setup.start({"log_dir": str(setup.folder / "other-logs")})
    other.until(phase="decode")
    run.finish()
    other.finish()
    assert other.lines[-1] == {"ended": True} and other.tokens == run.tokens and not other.reasons


def stop_and_kill_at_the_end(setup: FaultSetup, run: StreamsRun) -> None:
    setup.stage(0).kill()
    setup.stage(MIDDLE).suspend()
    run.resume()
