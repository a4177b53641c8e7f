"""The fault matrix: what is done to three stages with two streams over ssh, and what must come of it."""

import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.cluster import faulty_stage
from tests.cluster.fault_run import NUM_HOSTS, Scene, StreamsRun
from tests.cluster.hosts import wait_until

MIDDLE = 1
SLOW_KILOBITS = 1000
STOPPED_S = 30.0
RING_PORT = 41001
CLOCK_SOURCE = Path(__file__).with_name("jumping_clock.cc")
STANDS = r"\(.*step \d+( for \d+ s)?\)"
Tokens = tuple[list[int], ...]


class Outcome:
    """What becomes of the run."""

    UNNOTICED = "goes on, no restart"
    RESTARTED = "same tokens after a restart"
    ENDED = "ends with the host's name; the tokens so far are right"
    GONE = "no process is left on any host after 5 s"


@dataclass(frozen=True)
class Fault:
    """One row. ``break_it`` gets the running streams in ``phase``; it returns when the fault began (None: now).

    ``reasons`` are patterns of the restarts' reasons and of the final error, one for each; the last is the fault's own.
    """

    name: str
    break_it: Callable[[Scene, StreamsRun], float | None]
    outcome: str
    reasons: tuple[str, ...] = ()
    within_s: float | None = None
    phase: str = "decode"
    at: int = 1
    prepare: Callable[[Scene], None] = lambda _: None
    after: Callable[[Scene, StreamsRun], None] = lambda *_: None
    options: dict[str, object] = field(default_factory=dict)
    halts: dict[str, int] = field(default_factory=dict)
    left_s: float = 6.0


@dataclass(frozen=True)
class Finding:
    """What came of one row; ``reason`` is what the user was told."""

    fault: Fault
    noticed_s: float | None
    reason: str
    wall_s: float


def try_fault(fault: Fault, scene: Scene, expected: Tokens) -> Finding:
    """Do it, and assert all that must hold."""
    began = time.monotonic()
    fault.prepare(scene)
    run = scene.start(**fault.options, halts=fault.halts)
    try:
        run.until(phase=fault.phase, time=fault.at)
        broken_at = fault.break_it(scene, run) or time.monotonic()
        if fault.outcome != Outcome.GONE:
            run.finish()
        fault.after(scene, run)
        _check_outcome(fault, run, expected)
        noticed_s = run.noticed_at() - broken_at if run.reasons else None
        _check_reasons(fault, run, noticed_s)
        if run.reasons and "reports" not in fault.options:
            _check_report(scene, run)
        left = scene.hosts.all_processes
        assert wait_until(lambda: not left(), fault.left_s), f"left over: {left()}"
    finally:
        scene.close()
    return Finding(fault, noticed_s, run.reasons[-1] if run.reasons else "", time.monotonic() - began)


def _check_outcome(fault: Fault, run: StreamsRun, expected: Tokens) -> None:
    whole = fault.outcome in (Outcome.UNNOTICED, Outcome.RESTARTED)
    for tokens, right in zip(run.tokens, expected, strict=True):
        assert tokens == (right if whole else right[: len(tokens)]), f"the tokens are not the same; {run.reasons}"
    if whole:
        assert run.process.returncode == 0 and run.lines[-1] == {"ended": True}, (run.reasons, run.lines[-1])
    if fault.outcome == Outcome.ENDED:
        assert run.process.returncode == 1 and "error" in run.lines[-1], run.lines[-1]


def _check_reasons(fault: Fault, run: StreamsRun, noticed_s: float | None) -> None:
    assert len(run.reasons) == len(fault.reasons), run.reasons
    for reason, pattern in zip(run.reasons, fault.reasons, strict=True):
        assert re.match(pattern, reason), f"{reason!r} is not {pattern!r}"
        named = re.findall(r"stage (\d) on host-(\d)", reason)
        meant = re.findall(r"stage (\d) on host-(\d)", pattern)
        assert named[0] in meant and set(named) <= set(meant), f"others are blamed in {reason!r}"
    if fault.within_s is not None:
        assert noticed_s is not None and noticed_s < fault.within_s, f"noticed after {noticed_s} s"


def _check_report(scene: Scene, run: StreamsRun) -> None:
    report = scene.report()
    reason = run.reasons[-1].partition(" (given up after")[0]
    assert reason in report, f"{reason!r} is not in the report"
    assert "\n== versions\nmlx-k2 " in report and "== last lines of stage" in report
    assert '"tokens": 1,' in report or "== last steps" in report


# ---- what is done


def kill(rank: int) -> Callable[[Scene, StreamsRun], None]:
    return lambda scene, _: scene.stage(rank).kill()


def kill_and_go_on(rank: int) -> Callable[[Scene, StreamsRun], float]:
    """For a run that halts: kill the stage once it is there."""

    def break_it(scene: Scene, run: StreamsRun) -> float:
        scene.stage(rank).kill()
        run.go_on()
        return time.monotonic()

    return break_it


def kill_twice(rank: int, halted_in: str) -> Callable[[Scene, StreamsRun], float]:
    """Kill stage 0, and when all start again stage ``rank`` in that phase."""

    def break_it(scene: Scene, run: StreamsRun) -> float:
        scene.stage(0).kill()
        run.until(phase=halted_in, time=2)
        return kill_and_go_on(rank)(scene, run)

    return break_it


def stop(scene: Scene, run: StreamsRun) -> None:
    scene.stage(MIDDLE).suspend()


def kill_guard(scene: Scene, run: StreamsRun) -> None:
    scene.guard(MIDDLE).kill()


def cut(scene: Scene, run: StreamsRun) -> None:
    scene.hosts.cut(MIDDLE)


def cut_until_noticed(scene: Scene, run: StreamsRun) -> float:
    """Pull the cable, and plug it in again once the stage behind it has ended by its lease."""
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
    """Pull the cable that hidden states take, while ssh goes another way."""
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
    scene.hosts.end_sshd(MIDDLE)
    began = time.monotonic()
    run.until(restart=...)
    scene.hosts.start_sshd(MIDDLE)
    return began


def no_memory(scene: Scene, run: StreamsRun) -> float:
    """Leave the middle stage no room for another byte, just before it loads."""
    stage = scene.stage(MIDDLE)
    room = stage.memory_info().vms
    resource.prlimit(stage.pid, resource.RLIMIT_AS, (room, room))
    run.go_on()
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
    """Longer than the lease: the stages end, and on waking all start again."""
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
    assert any("No space left on device" in line.get("notice", "") for line in run.lines)


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
    scene.stage(MIDDLE).kill()
    return time.monotonic()


def fixed_ports(scene: Scene) -> None:
    for i in range(NUM_HOSTS):
        scene.on_host(i, ips=[f"{scene.hosts.addresses[i]}:{RING_PORT + i}"])


STRANGER = """
import os, socket, sys, time
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
    """When all connect anew, another process is at the middle stage's ring port before its neighbour."""
    scene.stage(0).kill()
    run.until(phase="connecting", time=2)
    command = [sys.executable, "-c", STRANGER, scene.hosts.addresses[MIDDLE], str(RING_PORT + MIDDLE)]
    peer = scene.hosts.exec(2, command)
    time.sleep(0.3)
    began = time.monotonic()
    run.go_on()
    run.until(restart=...)
    peer.kill()
    peer.wait()
    return began


def jumping_clock(scene: Scene) -> None:
    """The middle stage's wall clock goes by what stands in a file."""
    library = scene.folder / "clock.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(CLOCK_SOURCE), "-o", str(library), "-ldl"], check=True)
    (scene.folder / "clock").write_text("0\n")
    python = scene.folder / "python-of-another-time"
    faulty = faulty_stage.faulty_python(scene.folder / "faulty")
    python.write_text(f"#!/bin/sh\nLD_PRELOAD={library} CLOCK_OFFSET={scene.folder / 'clock'} exec {faulty}\n")
    python.chmod(0o755)
    scene.on_host(MIDDLE, python=str(python))


def jump(scene: Scene, run: StreamsRun) -> None:
    """A day ahead, then a year back."""
    says = scene.folder / "faulty" / "clock-says"
    for offset_s in (86_400, -31_536_000):
        (scene.folder / "clock").write_text(f"{offset_s}\n")
        faulty_stage.do(scene.folder / "faulty", "clock")
        assert wait_until(lambda: says.exists() and bool(says.read_text()), 20), "no step since the clock jumped"
        assert abs(float(says.read_text()) - time.time() - offset_s) < 60, "the clock did not jump"
        says.unlink()


def second_run(scene: Scene, run: StreamsRun) -> None:
    """The same streams once more, on the same hosts at the same time."""
    other = scene.start(log_dir=str(scene.folder / "other-logs"))
    other.until(phase="decode")
    run.finish()
    other.finish()
    assert other.lines[-1] == {"ended": True} and other.tokens == run.tokens and not other.reasons


def stop_and_kill_at_the_end(scene: Scene, run: StreamsRun) -> None:
    scene.stage(0).kill()
    scene.stage(MIDDLE).suspend()
    run.go_on()


def kill_in_prefill(scene: Scene, run: StreamsRun) -> float:
    scene.stage(MIDDLE).kill()
    return time.monotonic()


KILLED = r"ended with signal 9: somebody killed it"
NEXT = r"stage {rank} on host-{rank}"


def killed(rank: int) -> str:
    return rf"stage {rank} on host-{rank} {STANDS} {KILLED}"


def killed_in(phase: str) -> str:
    return rf"stage 1 on host-1 \({phase}\) {KILLED}"


RESTARTED, UNNOTICED, ENDED = Outcome.RESTARTED, Outcome.UNNOTICED, Outcome.ENDED
LOST = r"the ssh connection was lost \(cable, power, sleep, its sshd\), or its guard was killed"
AWAY = (
    rf"stage 1 on host-1 \(.*\) (cannot be heard: its host is off|ended: {LOST})|stage 1 on host-1 has not been heard"
)
HOP = (
    rf"stage 1 on host-1 {STANDS} does not get what stage 0 on host-0 {STANDS} has sent: the hop|"
    rf"stage 2 on host-2 {STANDS} does not get what stage 1 on host-1 {STANDS} has sent: the hop"
)

FAULTS: tuple[Fault, ...] = (
    Fault("first stage killed", kill(0), RESTARTED, (killed(0),), 1.0),
    Fault("middle stage killed", kill(1), RESTARTED, (killed(1),), 1.0),
    Fault("last stage killed", kill(2), RESTARTED, (killed(2),), 1.0),
    Fault("stage killed in prefill", kill_in_prefill, RESTARTED, (killed(1),), 1.0, phase="prefill"),
    Fault(
        "stage killed while it starts",
        kill_twice(1, "starting"),
        RESTARTED,
        (killed(0), killed_in("starting")),
        halts={"starting": 2},
    ),
    Fault(
        "stage killed while all connect",
        kill_twice(1, "connecting"),
        RESTARTED,
        (killed(0), rf"stage 1 on host-1 \(.*\) {KILLED}"),
        1.0,
        halts={"connecting": 2},
    ),
    Fault(
        "stage killed while it loads",
        kill_twice(1, "loading"),
        RESTARTED,
        (killed(0), rf"stage 1 on host-1 \(.*\) {KILLED}"),
        1.0,
        halts={"loading": 2},
    ),
    Fault(
        "stage killed at the very first start",
        kill_and_go_on(1),
        ENDED,
        (killed_in("starting"),),
        phase="starting",
        halts={"starting": 1},
    ),
    Fault(
        "one stage killed and one stopped while all end",
        stop_and_kill_at_the_end,
        UNNOTICED,
        phase="stopping",
        halts={"stopping": 1},
    ),
    Fault("guard killed", kill_guard, RESTARTED, (rf"stage 1 on host-1 \(.*\) ended: {LOST}",), 1.0),
    Fault(
        "stage stopped", stop, RESTARTED, (rf"stage 1 on host-1 {STANDS} is stopped: its process was suspended",), 10.0
    ),
    Fault(
        "exception inside a layer",
        fault_inside("exception"),
        RESTARTED,
        (r"stage 1 on host-1: ValueError: a fault inside a layer",),
        1.0,
        prepare=faulty_middle,
    ),
    Fault(
        "stage out of memory while it loads",
        no_memory_in_restart,
        RESTARTED,
        (killed(0), r"stage 1 on host-1: .*out of memory|stage 1 on host-1 \(.*\) ended with"),
        halts={"loading": 2},
    ),
    Fault("cable pulled for 2 s", cut_for_two_seconds, UNNOTICED),
    Fault("cable pulled, and plugged in later", cut_until_noticed, RESTARTED, (AWAY,), 10.0, options={"lease_s": 4.0}),
    Fault(
        "cable pulled for good",
        cut,
        ENDED,
        (AWAY, r"stage 1 on host-1 did not start: it cannot be reached"),
        after=restore,
        options={"restarts": 1, "lease_s": 4.0},
    ),
    Fault("data cable pulled, ssh goes another way", cut_data, RESTARTED, (HOP,), 10.0, prepare=data_cables),
    Fault("link at 1 Mbit/s", slow, UNNOTICED, phase="starting", after=was_slow),
    Fault(
        "host's sshd killed, with its sessions", end_sshd, RESTARTED, (rf"stage 1 on host-1 \(.*\) ended: {LOST}",), 1.0
    ),
    Fault("login shell prints", nothing, UNNOTICED, prepare=talkative_shell, after=silent_shell),
    Fault("stage prints on stdout", fault_inside("print"), UNNOTICED, prepare=faulty_middle),
    Fault(
        "rubbish among the frames",
        fault_inside("rubbish"),
        RESTARTED,
        (r"stage 1 on host-1 \(.*\) ended .*something else than frames",),
        2.5,
        prepare=faulty_middle,
    ),
    Fault(
        "frame cut in the middle",
        fault_inside("half-frame"),
        RESTARTED,
        (r"stage 1 on host-1 \(.*\) ended .*in the middle of a frame",),
        1.0,
        prepare=faulty_middle,
    ),
    Fault("10 MB on stderr", fault_inside("flood"), UNNOTICED, prepare=faulty_middle),
    Fault("clock jumps by a day and a year", jump, UNNOTICED, prepare=jumping_clock),
    Fault("disk for logs full", nothing, UNNOTICED, prepare=small_disk, after=whole_disk),
    Fault(
        "shard cut off on one host",
        nothing,
        ENDED,
        (r"stage 1 on host-1: .*safetensors",),
        phase="loading",
        prepare=truncated,
    ),
    Fault(
        "shard cut off while its stage starts again",
        truncate_and_kill,
        ENDED,
        (killed(1), r"stage 1 on host-1: .*safetensors", r"stage 1 on host-1: .*safetensors.*given up after 2"),
        prepare=own_model,
        options={"restarts": 2},
    ),
    Fault("two runs at once on the same hosts", second_run, UNNOTICED, phase="prefill"),
    Fault(
        "stranger at a ring port",
        stranger,
        RESTARTED,
        (killed(0), r"stage 1 on host-1: a stranger is connected in place of the previous stage"),
        5.0,
        halts={"connecting": 2},
        prepare=fixed_ports,
    ),
    Fault("coordinator killed", kill_coordinator, Outcome.GONE, left_s=5.0),
    Fault(
        "coordinator stopped for 30 s",
        stop_coordinator,
        RESTARTED,
        (
            "|".join(
                rf"stage {i} on host-{i} \(.*\) ended .*nothing came from the coordinator for 20 s" for i in range(3)
            ),
        ),
        5.0,
    ),
)
