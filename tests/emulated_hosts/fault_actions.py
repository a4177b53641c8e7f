"""Actions of the fault matrix: they prepare, cause, check and undo faults.

An action gets the setup of a fault and, except for a preparation, the run of the streams. An action that causes a fault
returns the time of the fault (time.monotonic), or None if the fault happens as the action returns.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.emulated_hosts import faulty_stage
from tests.emulated_hosts.fault_run import ANY, NUM_HOSTS, FaultSetup, StreamsRun
from tests.emulated_hosts.hosts import wait_until

MIDDLE_RANK = 1
SLOW_KILOBITS_PER_S = 1000
SUSPENDED_S = 30.0
"""Longer than the lease of 20 s."""
FIRST_RING_PORT = 41001
CLOCK_SOURCE = Path(__file__).with_name("jumping_clock.cc")


def kill(rank: int) -> Callable[[FaultSetup, StreamsRun], float]:
    """Return an action that kills the process of a stage, as soon as there is one."""

    def cause(setup: FaultSetup, _: StreamsRun) -> float:
        stage = setup.stage(rank)
        fault_at = time.monotonic()
        stage.kill()
        return fault_at

    return cause


def kill_and_resume(rank: int) -> Callable[[FaultSetup, StreamsRun], float]:
    """Return an action for a run that has halted (``halts``): it kills a stage and then resumes the run."""

    def cause(setup: FaultSetup, run: StreamsRun) -> float:
        fault_at = kill(rank)(setup, run)
        run.resume()
        return fault_at

    return cause


def kill_in_restart(rank: int, phase: str) -> Callable[[FaultSetup, StreamsRun], float]:
    """Return an action that kills stage 0 and then, in ``phase`` of the restart, stage ``rank``.

    The run must halt in that phase.
    """

    def cause(setup: FaultSetup, run: StreamsRun) -> float:
        setup.stage(0).kill()
        run.until(phase=phase, start=2)
        return kill_and_resume(rank)(setup, run)

    return cause


def suspend_stage(setup: FaultSetup, run: StreamsRun) -> None:
    setup.stage(MIDDLE_RANK).suspend()


def kill_guard(setup: FaultSetup, run: StreamsRun) -> float:
    guard = setup.guard(MIDDLE_RANK)
    fault_at = time.monotonic()
    guard.kill()
    return fault_at


def pull_cable(setup: FaultSetup, run: StreamsRun) -> None:
    setup.hosts.cut(MIDDLE_RANK)


def pull_cable_until_detected(setup: FaultSetup, run: StreamsRun) -> float:
    """Pull the cable of the middle host, and plug it in again when the lease has ended the stage there."""
    setup.hosts.cut(MIDDLE_RANK)
    fault_at = time.monotonic()
    run.until(restart=ANY)
    assert wait_until(lambda: not setup.hosts.processes(MIDDLE_RANK), 30)
    setup.hosts.restore(MIDDLE_RANK)
    return fault_at


def pull_cable_for_two_seconds(setup: FaultSetup, run: StreamsRun) -> None:
    setup.hosts.cut(MIDDLE_RANK)
    time.sleep(2)
    setup.hosts.restore(MIDDLE_RANK)


def pull_data_cable(setup: FaultSetup, run: StreamsRun) -> float:
    """Pull the cable of the hidden states, while ssh uses another one, until the restart."""
    setup.hosts.cut(MIDDLE_RANK, "eth1")
    fault_at = time.monotonic()
    run.until(restart=ANY)
    setup.hosts.restore(MIDDLE_RANK, "eth1")
    return fault_at


def plug_in_cable_again(setup: FaultSetup, run: StreamsRun) -> None:
    setup.hosts.restore(MIDDLE_RANK)


def use_data_cables(setup: FaultSetup) -> None:
    for rank in range(NUM_HOSTS):
        setup.on_host(rank, ips=[setup.hosts.data_addresses[rank]])


def slow_down_link(setup: FaultSetup, run: StreamsRun) -> None:
    setup.hosts.slow(MIDDLE_RANK, SLOW_KILOBITS_PER_S)


def check_was_slow(setup: FaultSetup, run: StreamsRun) -> None:
    assert setup.hosts.num_delayed_packets(MIDDLE_RANK) > 100, "the limit of the link has delayed almost no packet"


def end_sshd(setup: FaultSetup, run: StreamsRun) -> float:
    """Kill the sshd of the middle host with its sessions, and start it again when the fault was detected."""
    fault_at = time.monotonic()
    setup.hosts.end_sshd(MIDDLE_RANK)
    run.until(restart=ANY)
    setup.hosts.start_sshd(MIDDLE_RANK)
    return fault_at


def limit_memory_in_restart(setup: FaultSetup, run: StreamsRun) -> None:
    """Kill stage 0, and when the middle stage loads again, allow it no more address space than it has then.

    The run must halt in the second phase loading.
    """
    setup.stage(0).kill()
    run.until(phase="loading", start=2)
    stage = setup.stage(MIDDLE_RANK)
    num_bytes = stage.memory_info().vms
    resource.prlimit(stage.pid, resource.RLIMIT_AS, (num_bytes, num_bytes))
    run.resume()


def cause_inside_stage(name: str) -> Callable[[FaultSetup, StreamsRun], None]:
    """Return an action that causes a fault of faulty_stage.NAMES inside the middle stage."""
    return lambda setup, _: faulty_stage.request_fault(setup.folder / "faulty", name)


def use_faulty_stage(setup: FaultSetup) -> None:
    setup.on_host(MIDDLE_RANK, python=faulty_stage.faulty_python(setup.folder / "faulty"))


def use_printing_shell(setup: FaultSetup) -> None:
    (setup.hosts.homes[MIDDLE_RANK] / ".bashrc").write_text("echo welcome; echo have fun\n")


def check_shell_output(setup: FaultSetup, run: StreamsRun) -> None:
    (setup.hosts.homes[MIDDLE_RANK] / ".bashrc").unlink()
    assert "its login shell prints" in (setup.log_dir / "stages.log").read_text()


def do_nothing(setup: FaultSetup, run: StreamsRun) -> None:
    """Do nothing: the preparation is the fault."""


def kill_coordinator(setup: FaultSetup, run: StreamsRun) -> None:
    run.process.kill()


def suspend_coordinator(setup: FaultSetup, run: StreamsRun) -> float:
    """Suspend the coordinator for longer than the lease. The stages end, and all restart after it resumes."""
    coordinator = psutil.Process(run.process.pid)
    coordinator.suspend()
    time.sleep(SUSPENDED_S)
    commands = setup.hosts.all_processes().values()
    # The ssh clients of the coordinator remain; their command lines name the stage program, too.
    assert not any("mlx_k2.stage" in command for command in commands if "ssh" not in command)
    coordinator.resume()
    return time.monotonic()


def use_small_disk(setup: FaultSetup) -> None:
    setup.log_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", setup.log_dir], check=True)


def check_full_disk(setup: FaultSetup, run: StreamsRun) -> None:
    subprocess.run(["umount", setup.log_dir], check=True)
    assert any("No space left on device" in line.get("notify", "") for line in run.lines)


def copy_model(setup: FaultSetup) -> None:
    setup.copy_model(MIDDLE_RANK)


def use_truncated_model(setup: FaultSetup) -> None:
    """Cut off the second half of a file that the middle stage loads."""
    _truncate(setup.copy_model(MIDDLE_RANK))


def _truncate(model: Path) -> None:
    shards = sorted(model.glob("*.safetensors"))
    shard = shards[len(shards) // 2]
    os.truncate(shard, shard.stat().st_size // 2)


def truncate_and_kill(setup: FaultSetup, run: StreamsRun) -> float:
    _truncate(setup.folder / f"model-{MIDDLE_RANK}")
    return kill(MIDDLE_RANK)(setup, run)


def use_fixed_ports(setup: FaultSetup) -> None:
    for rank in range(NUM_HOSTS):
        setup.on_host(rank, ips=[f"{setup.hosts.data_addresses[rank]}:{FIRST_RING_PORT + rank}"])


UNKNOWN_PROCESS = """
import os, socket, sys, time
while True:
    try:
        peer = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1)
        break
    except OSError:
        pass
print("connected", flush=True)
peer.sendall(os.urandom(100))
time.sleep(5)
"""


def connect_unknown_process(setup: FaultSetup, run: StreamsRun) -> float:
    """Connect an unknown process to the middle stage's ring port during a restart, before its neighbour does.

    The run must halt in the second phase connecting.
    """
    setup.stage(0).kill()
    run.until(phase="connecting", start=2)
    command = [
        sys.executable,
        "-c",
        UNKNOWN_PROCESS,
        setup.hosts.data_addresses[MIDDLE_RANK],
        str(FIRST_RING_PORT + MIDDLE_RANK),
    ]
    peer = setup.hosts.exec(NUM_HOSTS - 1, command, stdout=subprocess.PIPE)
    assert peer.stdout is not None
    # Without its data cable the neighbour cannot connect first; TCP tries again later.
    setup.hosts.cut(MIDDLE_RANK - 1, "eth1")
    run.resume()
    assert peer.stdout.readline() == b"connected\n"
    fault_at = time.monotonic()
    setup.hosts.restore(MIDDLE_RANK - 1, "eth1")
    run.until(restart=ANY)
    peer.kill()
    peer.wait()
    peer.stdout.close()
    return fault_at


def use_jumping_clock(setup: FaultSetup) -> None:
    """Let a library add the seconds in the file ``clock`` to the middle stage's wall clock."""
    library = setup.folder / "clock.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(CLOCK_SOURCE), "-o", str(library), "-ldl"], check=True)
    (setup.folder / "clock").write_text("0\n")
    python = setup.folder / "python-with-offset-clock"
    faulty = faulty_stage.faulty_python(setup.folder / "faulty")
    python.write_text(f"#!/bin/sh\nLD_PRELOAD={library} CLOCK_OFFSET={setup.folder / 'clock'} exec {faulty}\n")
    python.chmod(0o755)
    setup.on_host(MIDDLE_RANK, python=str(python))


def change_clock(setup: FaultSetup, run: StreamsRun) -> None:
    """Set the middle stage's wall clock one day ahead, then one year back."""
    report = setup.folder / "faulty" / "clock-report"
    for offset_s in (86_400, -31_536_000):
        (setup.folder / "clock").write_text(f"{offset_s}\n")
        faulty_stage.request_fault(setup.folder / "faulty", "clock")  # no fault: the stage reports its clock
        assert wait_until(lambda: report.exists() and bool(report.read_text()), 20), "no step since the clock jumped"
        assert abs(float(report.read_text()) - time.time() - offset_s) < 60, "the clock did not jump"
        report.unlink()


def run_twice(setup: FaultSetup, run: StreamsRun) -> None:
    """Run the same streams a second time on the same hosts, at the same time."""
    other = setup.start({"log_dir": str(setup.folder / "other-logs")})
    other.until(phase="decode")
    run.finish()
    other.finish()
    assert other.lines[-1] == {"ended": True} and other.tokens == run.tokens and not other.reasons


def kill_one_and_suspend_one(setup: FaultSetup, run: StreamsRun) -> None:
    """Kill a stage and suspend another one of a run that has halted, then resume the run."""
    setup.stage(0).kill()
    setup.stage(MIDDLE_RANK).suspend()
    run.resume()
