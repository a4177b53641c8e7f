"""Actions of the fault matrix: they prepare, cause, check and undo faults.

Each takes a scene and, except for preparations, its running streams. An action that causes a fault returns when the
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
from tests.emulated_hosts.fault_run import NUM_HOSTS, Scene, StreamsRun
from tests.emulated_hosts.hosts import wait_until

MIDDLE = 1
SLOW_KILOBITS = 1000
STOPPED_S = 30.0
RING_PORT = 41001
CLOCK_SOURCE = Path(__file__).with_name("jumping_clock.cc")


def kill(rank: int) -> Callable[[Scene, StreamsRun], float]:
    def break_it(scene: Scene, run: StreamsRun) -> float:
        stage = scene.stage(rank)
        began = time.monotonic()
        stage.kill()
        return began

    return break_it


def kill_and_resume(rank: int) -> Callable[[Scene, StreamsRun], float]:
    """Return an action for a halted run: kill the stage as soon as it exists, then resume the run."""

    def break_it(scene: Scene, run: StreamsRun) -> float:
        stage = scene.stage(rank)
        began = time.monotonic()
        stage.kill()
        run.resume()
        return began

    return break_it


def kill_twice(rank: int, halted_in: str) -> Callable[[Scene, StreamsRun], float]:
    """Return an action that kills stage 0 and, during the restart, stage ``rank`` in the phase ``halted_in``."""

    def break_it(scene: Scene, run: StreamsRun) -> float:
        scene.stage(0).kill()
        run.until(phase=halted_in, time=2)
        return kill_and_resume(rank)(scene, run)

    return break_it


def stop(scene: Scene, run: StreamsRun) -> None:
    scene.stage(MIDDLE).suspend()


def kill_guard(scene: Scene, run: StreamsRun) -> float:
    guard = scene.guard(MIDDLE)
    began = time.monotonic()
    guard.kill()
    return began


def cut(scene: Scene, run: StreamsRun) -> None:
    scene.hosts.cut(MIDDLE)


def cut_until_detected(scene: Scene, run: StreamsRun) -> float:
    """Pull the middle host's cable, and plug it in again after the stage there has ended by its lease."""
    scene.hosts.cut(MIDDLE)
    began = time.monotonic()
    run.until(restart=...)
    assert wait_until(lambda: not scene.hosts.processes(MIDDLE), 30)
    scene.hosts.restore(MIDDLE)
    return began


def cut_for_two_seconds(scene: Scene, run: StreamsRun) -> None:
    scene.hosts.cut(MIDDLE)
    time.sleep(2)
    scene.hosts.restore(MIDDLE)


def cut_data(scene: Scene, run: StreamsRun) -> float:
    """Pull the cable of the hidden states, while ssh uses another one, until the restart."""
    scene.hosts.cut(MIDDLE, "eth1")
    began = time.monotonic()
    run.until(restart=...)
    scene.hosts.restore(MIDDLE, "eth1")
    return began


def restore(scene: Scene, run: StreamsRun) -> None:
    scene.hosts.restore(MIDDLE)


def data_cables(scene: Scene) -> None:
    for i in range(NUM_HOSTS):
        scene.on_host(i, ips=[scene.hosts.data_addresses[i]])


def slow(scene: Scene, run: StreamsRun) -> None:
    scene.hosts.slow(MIDDLE, SLOW_KILOBITS)


def was_slow(scene: Scene, run: StreamsRun) -> None:
    assert scene.hosts.times_held_back(MIDDLE) > 100


def end_sshd(scene: Scene, run: StreamsRun) -> float:
    began = time.monotonic()
    scene.hosts.end_sshd(MIDDLE)
    run.until(restart=...)
    scene.hosts.start_sshd(MIDDLE)
    return began


def no_memory(scene: Scene, run: StreamsRun) -> float:
    """Limit the middle stage's address space to its present size, just before it loads."""
    stage = scene.stage(MIDDLE)
    space = stage.memory_info().vms
    resource.prlimit(stage.pid, resource.RLIMIT_AS, (space, space))
    run.resume()
    return time.monotonic()


def no_memory_in_restart(scene: Scene, run: StreamsRun) -> float:
    scene.stage(0).kill()
    run.until(phase="loading", time=2)
    return no_memory(scene, run)


def fault_inside(name: str) -> Callable[[Scene, StreamsRun], None]:
    return lambda scene, _: faulty_stage.do(scene.folder / "faulty", name)


def faulty_middle(scene: Scene) -> None:
    scene.on_host(MIDDLE, python=faulty_stage.faulty_python(scene.folder / "faulty"))


def talkative_shell(scene: Scene) -> None:
    (scene.hosts.homes[MIDDLE] / ".bashrc").write_text("echo welcome; echo have fun\n")


def silent_shell(scene: Scene, run: StreamsRun) -> None:
    (scene.hosts.homes[MIDDLE] / ".bashrc").unlink()
    assert "its login shell prints" in (scene.log_dir / "stages.log").read_text()


def nothing(scene: Scene, run: StreamsRun) -> None:
    pass


def kill_coordinator(scene: Scene, run: StreamsRun) -> None:
    run.process.kill()


def stop_coordinator(scene: Scene, run: StreamsRun) -> float:
    """Suspend the coordinator for longer than the lease. The stages end, and all restart after it resumes."""
    coordinator = psutil.Process(run.process.pid)
    coordinator.suspend()
    time.sleep(STOPPED_S)
    assert not any(
        "mlx_k2.stage" in command for command in scene.hosts.all_processes().values() if "ssh" not in command
    )
    coordinator.resume()
    return time.monotonic()


def small_disk(scene: Scene) -> None:
    scene.log_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", scene.log_dir], check=True)


def whole_disk(scene: Scene, run: StreamsRun) -> None:
    subprocess.run(["umount", scene.log_dir], check=True)
    assert any("No space left on device" in line.get("notify", "") for line in run.lines)


def own_model(scene: Scene) -> None:
    scene.own_model(MIDDLE)


def truncated(scene: Scene) -> None:
    """Cut off the second half of a file that the middle stage loads."""
    _truncate(scene.own_model(MIDDLE))


def _truncate(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[len(list(model.glob("*.safetensors"))) // 2]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)


def truncate_and_kill(scene: Scene, run: StreamsRun) -> float:
    _truncate(scene.folder / f"model-{MIDDLE}")
    return kill(MIDDLE)(scene, run)


def fixed_ports(scene: Scene) -> None:
    for i in range(NUM_HOSTS):
        scene.on_host(i, ips=[f"{scene.hosts.addresses[i]}:{RING_PORT + i}"])


STRANGER = """
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


def stranger(scene: Scene, run: StreamsRun) -> float:
    """Connect another process to the middle stage's ring port before its neighbour does, during a restart."""
    scene.stage(0).kill()
    run.until(phase="connecting", time=2)
    command = [sys.executable, "-c", STRANGER, scene.hosts.addresses[MIDDLE], str(RING_PORT + MIDDLE)]
    peer = scene.hosts.exec(2, command, stdout=subprocess.PIPE)
    assert peer.stdout is not None
    assert peer.stdout.readline() == b"ready\n"  # from here on it tries to connect without a pause
    began = time.monotonic()
    run.resume()
    run.until(restart=...)
    peer.kill()
    peer.wait()
    peer.stdout.close()
    return began


def jumping_clock(scene: Scene) -> None:
    """Add the offset in a file, in seconds, to the middle stage's wall clock."""
    library = scene.folder / "clock.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(CLOCK_SOURCE), "-o", str(library), "-ldl"], check=True)
    (scene.folder / "clock").write_text("0\n")
    python = scene.folder / "python-of-another-time"
    faulty = faulty_stage.faulty_python(scene.folder / "faulty")
    python.write_text(f"#!/bin/sh\nLD_PRELOAD={library} CLOCK_OFFSET={scene.folder / 'clock'} exec {faulty}\n")
    python.chmod(0o755)
    scene.on_host(MIDDLE, python=str(python))


def jump(scene: Scene, run: StreamsRun) -> None:
    """Set the middle stage's wall clock one day ahead, then one year back."""
    reports = scene.folder / "faulty" / "clock-says"
    for offset_s in (86_400, -31_536_000):
        (scene.folder / "clock").write_text(f"{offset_s}\n")
        faulty_stage.do(scene.folder / "faulty", "clock")
        assert wait_until(lambda: reports.exists() and bool(reports.read_text()), 20), "no step since the clock jumped"
        assert abs(float(reports.read_text()) - time.time() - offset_s) < 60, "the clock did not jump"
        reports.unlink()


def second_run(scene: Scene, run: StreamsRun) -> None:
    """Run the same streams a second time, on the same hosts at the same time."""
    other = scene.start({"log_dir": str(scene.folder / "other-logs")})
    other.until(phase="decode")
    run.finish()
    other.finish()
    assert other.lines[-1] == {"ended": True} and other.tokens == run.tokens and not other.reasons


def stop_and_kill_at_the_end(scene: Scene, run: StreamsRun) -> None:
    scene.stage(0).kill()
    scene.stage(MIDDLE).suspend()
    run.resume()
