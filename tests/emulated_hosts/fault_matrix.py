"""The fault matrix: every row is a fault, its expected outcome, and the time limit for its detection."""

from tests.emulated_hosts import fault_actions as actions
from tests.emulated_hosts.faults import Fault, Outcome

RESTARTED, UNNOTICED, ENDED = Outcome.RESTARTED, Outcome.UNNOTICED, Outcome.ENDED

# Patterns of the reasons of restarts, and parts of such patterns.
AT_STEP = r"\(.*step \d+( for \d+ s)?\)"
KILLED = r"ended with signal 9: it was killed"
KILLED_AT_STEP = [rf"stage {rank} on host-{rank} {AT_STEP} {KILLED}" for rank in range(3)]
MIDDLE_KILLED = rf"stage 1 on host-1 \(.*\) {KILLED}"
MIDDLE_KILLED_IN_START = rf"stage 1 on host-1 \(starting\) {KILLED}"
CONNECTION_LOST = r"the ssh connection was lost \(cable, power, sleep, its sshd\), or its guard was killed"
MIDDLE_LOST = rf"stage 1 on host-1 \(.*\) ended: {CONNECTION_LOST}"
COORDINATOR_SILENT = "nothing came from the coordinator for 20 s"
COORDINATOR_SILENT = "nothing came from the coordinator for 20 s"
MIDDLE_AWAY = (
    rf"stage 1 on host-1 \(.*\) does not answer: its host is off|{MIDDLE_LOST}|stage 1 on host-1 has not answered"
)
STUCK_HOP = (
    rf"stage 1 on host-1 {AT_STEP} does not receive what stage 0 on host-0 {AT_STEP} has sent: the hop|"
    rf"stage 2 on host-2 {AT_STEP} does not receive what stage 1 on host-1 {AT_STEP} has sent: the hop"
)

FAULTS: tuple[Fault, ...] = (
    Fault("first stage killed", actions.kill(0), RESTARTED, (KILLED_AT_STEP[0],), within_s=1.0),
    Fault("middle stage killed", actions.kill(1), RESTARTED, (KILLED_AT_STEP[1],), within_s=1.0),
    Fault("last stage killed", actions.kill(2), RESTARTED, (KILLED_AT_STEP[2],), within_s=1.0),
    Fault("stage killed in prefill", actions.kill(1), RESTARTED, (KILLED_AT_STEP[1],), within_s=1.0, phase="prefill"),
    Fault(
        "stage killed while it starts again",
        actions.kill_in_restart(1, "starting"),
        RESTARTED,
        (KILLED_AT_STEP[0], MIDDLE_KILLED_IN_START),
        halts={"starting": 2},
    ),
    Fault(
        "stage killed while all connect again",
        actions.kill_in_restart(1, "connecting"),
        RESTARTED,
        (KILLED_AT_STEP[0], MIDDLE_KILLED),
        within_s=1.0,
        halts={"connecting": 2},
    ),
    Fault(
        "stage killed while it loads again",
        actions.kill_in_restart(1, "loading"),
        RESTARTED,
        (KILLED_AT_STEP[0], MIDDLE_KILLED),
        within_s=1.0,
        halts={"loading": 2},
    ),
    Fault(
        "stage killed at the first start",
        actions.kill_and_resume(1),
        ENDED,
        (MIDDLE_KILLED_IN_START,),
        phase="starting",
        halts={"starting": 1},
    ),
    Fault(
        "one stage killed and one suspended while the command ends",
        actions.kill_one_and_suspend_one,
        UNNOTICED,
        phase="stopping",
        halts={"stopping": 1},
    ),
    Fault("guard killed", actions.kill_guard, RESTARTED, (MIDDLE_LOST,), within_s=1.0),
    Fault(
        "stage suspended (SIGSTOP)",
        actions.suspend_stage,
        RESTARTED,
        (rf"stage 1 on host-1 {AT_STEP} is stopped: its process was suspended",),
        within_s=10.0,
    ),
    Fault(
        "exception inside a layer",
        actions.cause_inside_stage("exception"),
        RESTARTED,
        (r"stage 1 on host-1: ValueError: a fault inside a layer",),
        within_s=1.0,
        prepare=actions.use_faulty_stage,
    ),
    Fault(
        "stage out of memory while it loads again",
        actions.limit_memory_in_restart,
        RESTARTED,
        (KILLED_AT_STEP[0], r"stage 1 on host-1: .*out of memory|stage 1 on host-1 \(.*\) ended with"),
        halts={"loading": 2},
    ),
    Fault("cable pulled for 2 s", actions.pull_cable_for_two_seconds, UNNOTICED),
    Fault(
        "cable pulled, and plugged in later (--lease 4)",
        actions.pull_cable_until_detected,
        RESTARTED,
        (MIDDLE_AWAY,),
        within_s=10.0,
        options={"lease_s": 4.0},
    ),
    Fault(
        "cable pulled and not plugged in again (--lease 4 --restarts 1)",
        actions.pull_cable,
        ENDED,
        (MIDDLE_AWAY, r"stage 1 on host-1 did not start: it cannot be reached"),
        after=actions.plug_in_cable_again,
        options={"restarts": 1, "lease_s": 4.0},
    ),
    Fault(
        "data cable pulled, ssh goes another way",
        actions.pull_data_cable,
        RESTARTED,
        (STUCK_HOP,),
        within_s=10.0,
        prepare=actions.use_data_cables,
    ),
    Fault("link at 1 Mbit/s", actions.slow_down_link, UNNOTICED, phase="starting", after=actions.check_was_slow),
    Fault("host's sshd killed, with its sessions", actions.end_sshd, RESTARTED, (MIDDLE_LOST,), within_s=1.0),
    Fault(
        "login shell prints text at each ssh login",
        actions.do_nothing,
        UNNOTICED,
        prepare=actions.use_printing_shell,
        after=actions.check_shell_output,
    ),
    Fault("stage prints on stdout", actions.cause_inside_stage("print"), UNNOTICED, prepare=actions.use_faulty_stage),
    Fault(
        "arbitrary bytes between a stage's messages",
        actions.cause_inside_stage("rubbish"),
        RESTARTED,
        (r"stage 1 on host-1 \(.*\) ended .*bytes that are not frames",),
        within_s=2.5,
        prepare=actions.use_faulty_stage,
    ),
    Fault(
        "a stage's message cut in the middle",
        actions.cause_inside_stage("half-frame"),
        RESTARTED,
        (r"stage 1 on host-1 \(.*\) ended .*in the middle of a frame",),
        within_s=1.0,
        prepare=actions.use_faulty_stage,
    ),
    Fault("10 MB on stderr", actions.cause_inside_stage("flood"), UNNOTICED, prepare=actions.use_faulty_stage),
    Fault("clock jumps by a day and a year", actions.change_clock, UNNOTICED, prepare=actions.use_jumping_clock),
    Fault(
        "disk for logs full",
        actions.do_nothing,
        UNNOTICED,
        prepare=actions.use_small_disk,
        after=actions.check_full_disk,
    ),
    Fault(
        "weights file cut off on one host, at the first start",
        actions.do_nothing,
        ENDED,
        (r"stage 1 on host-1: .*safetensors",),
        phase="loading",
        prepare=actions.use_truncated_model,
    ),
    Fault(
        "weights file cut off while its stage starts again (--restarts 2)",
        actions.truncate_and_kill,
        ENDED,
        (KILLED_AT_STEP[1], r"stage 1 on host-1: .*safetensors", r"stage 1 on host-1: .*safetensors.*given up after 2"),
        prepare=actions.copy_model,
        options={"restarts": 2},
    ),
    Fault("two runs at once on the same hosts", actions.run_twice, UNNOTICED, phase="prefill"),
    Fault(
        "unknown process connects to a stage's port",
        actions.connect_unknown_process,
        RESTARTED,
        (KILLED_AT_STEP[0], r"stage 1 on host-1: an unknown process is connected as the previous stage"),
        within_s=5.0,
        halts={"connecting": 2},
        prepare=actions.use_fixed_ports,
    ),
    Fault("coordinator killed", actions.kill_coordinator, Outcome.GONE, end_timeout_s=5.0),
    Fault(
        "coordinator suspended for 30 s",
        actions.suspend_coordinator,
        RESTARTED,
        ("|".join(rf"stage {rank} on host-{rank} \(.*\) ended .*{COORDINATOR_SILENT}" for rank in range(3)),),
        within_s=5.0,
    ),
)
