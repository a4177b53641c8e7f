"""The fault matrix: every row is a fault, its expected outcome, and the time limit for its detection."""

from tests.emulated_hosts.fault_actions import (
    check_full_disk,
    check_shell_output,
    check_was_slow,
    connect_another_process,
    cut,
    cut_data,
    cut_for_two_seconds,
    cut_until_detected,
    data_cables,
    end_sshd,
    fault_inside,
    faulty_middle,
    fixed_ports,
    jump,
    jumping_clock,
    kill,
    kill_and_resume,
    kill_coordinator,
    kill_guard,
    kill_twice,
    no_memory_in_restart,
    nothing,
    own_model,
    printing_shell,
    restore,
    second_run,
    slow,
    small_disk,
    stop,
    stop_and_kill_at_the_end,
    stop_coordinator,
    truncate_and_kill,
    truncated,
)
from tests.emulated_hosts.faults import Fault, Outcome

AT_STEP = r"\(.*step \d+( for \d+ s)?\)"
KILLED = r"ended with signal 9: it was killed"


def killed(rank: int) -> str:
    return rf"stage {rank} on host-{rank} {AT_STEP} {KILLED}"


def killed_in(phase: str) -> str:
    return rf"stage 1 on host-1 \({phase}\) {KILLED}"


RESTARTED, UNNOTICED, ENDED = Outcome.RESTARTED, Outcome.UNNOTICED, Outcome.ENDED
LOST = r"the ssh connection was lost \(cable, power, sleep, its sshd\), or its guard was killed"
AWAY = rf"stage 1 on host-1 \(.*\) (does not answer: its host is off|ended: {LOST})|stage 1 on host-1 has not answered"
HOP = (
    rf"stage 1 on host-1 {AT_STEP} does not receive what stage 0 on host-0 {AT_STEP} has sent: the hop|"
    rf"stage 2 on host-2 {AT_STEP} does not receive what stage 1 on host-1 {AT_STEP} has sent: the hop"
)

FAULTS: tuple[Fault, ...] = (
    Fault("first stage killed", kill(0), RESTARTED, (killed(0),), 1.0),
    Fault("middle stage killed", kill(1), RESTARTED, (killed(1),), 1.0),
    Fault("last stage killed", kill(2), RESTARTED, (killed(2),), 1.0),
    Fault("stage killed in prefill", kill(1), RESTARTED, (killed(1),), 1.0, phase="prefill"),
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
        kill_and_resume(1),
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
        "stage stopped", stop, RESTARTED, (rf"stage 1 on host-1 {AT_STEP} is stopped: its process was suspended",), 10.0
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
    Fault("cable pulled, and plugged in later", cut_until_detected, RESTARTED, (AWAY,), 10.0, options={"lease_s": 4.0}),
    Fault(
        "cable pulled and not plugged in again",
        cut,
        ENDED,
        (AWAY, r"stage 1 on host-1 did not start: it cannot be reached"),
        after=restore,
        options={"restarts": 1, "lease_s": 4.0},
    ),
    Fault("data cable pulled, ssh goes another way", cut_data, RESTARTED, (HOP,), 10.0, prepare=data_cables),
    Fault("link at 1 Mbit/s", slow, UNNOTICED, phase="starting", after=check_was_slow),
    Fault(
        "host's sshd killed, with its sessions", end_sshd, RESTARTED, (rf"stage 1 on host-1 \(.*\) ended: {LOST}",), 1.0
    ),
    Fault("login shell prints", nothing, UNNOTICED, prepare=printing_shell, after=check_shell_output),
    Fault("stage prints on stdout", fault_inside("print"), UNNOTICED, prepare=faulty_middle),
    Fault(
        "rubbish among the frames",
        fault_inside("rubbish"),
        RESTARTED,
        (r"stage 1 on host-1 \(.*\) ended .*bytes that are not frames",),
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
    Fault("disk for logs full", nothing, UNNOTICED, prepare=small_disk, after=check_full_disk),
    Fault(
        "weights file cut off on one host",
        nothing,
        ENDED,
        (r"stage 1 on host-1: .*safetensors",),
        phase="loading",
        prepare=truncated,
    ),
    Fault(
        "weights file cut off while its stage starts again",
        truncate_and_kill,
        ENDED,
        (killed(1), r"stage 1 on host-1: .*safetensors", r"stage 1 on host-1: .*safetensors.*given up after 2"),
        prepare=own_model,
        options={"restarts": 2},
    ),
    Fault("two runs at once on the same hosts", second_run, UNNOTICED, phase="prefill"),
    Fault(
        "unknown process at a ring port",
        connect_another_process,
        RESTARTED,
        (killed(0), r"stage 1 on host-1: an unknown process is connected as the previous stage"),
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
