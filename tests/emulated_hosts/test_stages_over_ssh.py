"""Tests of stages over real ssh: groups that work, and the error for each reason why a stage cannot start."""

import re
import sys
from pathlib import Path

import psutil
import pytest

from mlx_k2.errors import StageStartError
from mlx_k2.launch.group import StageGroup
from mlx_k2.launch.ssh import install_commands
from mlx_k2.launch.stage_events import StageEnded, StageMessage
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.protocol.messages import Connected, Step, StepDone
from tests.advice import follows_advice
from tests.emulated_hosts.hosts import EmulatedHosts, wait_until
from tests.emulated_hosts.ring_group import enter_situation, receive, start_ring_group
from tests.launch.guarded import stand_in_python
from tests.launch.test_group import GROUP_SENDS_SIGNAL

pytestmark = pytest.mark.slow

EVENT_TIMEOUT_S = 60.0
"""Deadline for an event, long enough for a busy machine."""

LEASE_S = 20.0

LONG_LEASE_S = 600.0
"""A lease longer than every test, so that no stage ends because its lease is over."""


@pytest.fixture
def hosts(emulated_hosts: EmulatedHosts, monkeypatch: pytest.MonkeyPatch) -> EmulatedHosts:
    """Return the hosts. The ssh of this process connects from host 0."""
    monkeypatch.setenv("PATH", str(emulated_hosts.ssh_folder(0)), prepend=":")
    return emulated_hosts


def end_of_start(location: StageLocation) -> StageEnded:
    """Start a stage that cannot start; return its end."""
    with StageGroup([location], LEASE_S, lambda _: None) as group:
        event = group.receive(EVENT_TIMEOUT_S)
    assert isinstance(event, StageEnded)
    return event


def test_three_stages_on_three_hosts_send_arrays_along_the_ring(hosts: EmulatedHosts, tmp_path: Path) -> None:
    num_steps = 20
    with start_ring_group(hosts.names, stand_in_python(tmp_path, "ring"), LEASE_S) as group:
        enter_situation("idle", group, hosts.addresses)
        for number in range(1, num_steps + 1):
            group.send_all(Step(number, rows=()))
        reports = [receive(group, StepDone) for _ in range(num_steps * len(hosts.names))]
    sums = [report.tokens[0].token_id for report in reports if isinstance(report, StepDone) and report.tokens]
    # Each of the three stages adds the number of the step.
    assert sums == [3 * number for number in range(1, num_steps + 1)]
    assert hosts.all_processes() == {}


def test_a_suspended_stage_on_another_host_is_ended_by_its_guard_when_the_group_closes(
    hosts: EmulatedHosts, tmp_path: Path
) -> None:
    log: list[str] = []
    with StageGroup([StageLocation("host-1", stand_in_python(tmp_path, "echo"))], LONG_LEASE_S, log.append) as group:
        assert group.receive(EVENT_TIMEOUT_S) == StageMessage(0, Connected())
        (stage,) = [pid for pid, command in hosts.processes(1).items() if "stage_programs.py" in command]
        psutil.Process(stage).suspend()
    assert not any(GROUP_SENDS_SIGNAL in line for line in log)
    assert wait_until(lambda: not hosts.all_processes(), EVENT_TIMEOUT_S), hosts.all_processes()


def test_a_pulled_cable_ends_only_the_stage_on_its_host(hosts: EmulatedHosts, tmp_path: Path) -> None:
    locations = [StageLocation(name, stand_in_python(tmp_path, "echo")) for name in hosts.names]
    with StageGroup(locations, lease_s=4.0, log=lambda _: None) as group:
        for _ in hosts.names:
            receive(group, Connected)
        hosts.cut(1)
        end = group.receive(EVENT_TIMEOUT_S)
        assert isinstance(end, StageEnded) and end.rank == 1
        assert str(end.as_error()).startswith(
            "stage 1 on host-1 (last status: starting) ended: the ssh connection was lost"
        )
        group.send(2, Step(1, rows=()))
        assert group.receive(EVENT_TIMEOUT_S) == StageMessage(2, StepDone(1, busy_s=0.0))
    assert wait_until(lambda: not hosts.all_processes(), EVENT_TIMEOUT_S), hosts.all_processes()


def test_a_cable_pulled_for_two_seconds_ends_no_stage(hosts: EmulatedHosts, tmp_path: Path) -> None:
    with StageGroup([StageLocation("host-1", stand_in_python(tmp_path, "echo"))], LEASE_S, lambda _: None) as group:
        receive(group, Connected)
        hosts.cut(1)
        assert wait_until(lambda: group.silence_s(0) > 2, EVENT_TIMEOUT_S)
        hosts.restore(1)
        group.send(0, Step(1, rows=()))
        assert group.receive(EVENT_TIMEOUT_S) == StageMessage(0, StepDone(1, busy_s=0.0))


def test_a_killed_ssh_session_is_the_end_of_its_stage_and_leaves_no_process(
    hosts: EmulatedHosts, tmp_path: Path
) -> None:
    with StageGroup(
        [StageLocation("host-1", stand_in_python(tmp_path, "reads_nothing"))], LONG_LEASE_S, lambda _: None
    ) as group:
        receive(group, Connected)
        (guard,) = [pid for pid, command in hosts.processes(1).items() if "guarded.py" in command]
        session = psutil.Process(guard).parent()
        assert session is not None and session.name().startswith("sshd")
        session.kill()
        assert isinstance(group.receive(EVENT_TIMEOUT_S), StageEnded)
        assert wait_until(lambda: not hosts.processes(1), EVENT_TIMEOUT_S), hosts.processes(1)


def test_the_output_of_a_login_shell_is_logged_and_skipped(hosts: EmulatedHosts, tmp_path: Path) -> None:
    (hosts.homes[1] / ".bashrc").write_text("echo welcome to host-1; echo have fun\n")
    log: list[str] = []
    with StageGroup([StageLocation("host-1", stand_in_python(tmp_path, "echo"))], LEASE_S, log.append) as group:
        assert group.receive(EVENT_TIMEOUT_S) == StageMessage(0, Connected())
    assert "[stage 0 host-1] its login shell prints 27 bytes before a command starts; skipped:" in log
    assert "[stage 0 host-1] | welcome to host-1" in log


def test_on_a_host_without_the_path_of_this_python_the_command_of_its_login_shell_is_tried(
    hosts: EmulatedHosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = hosts.homes[1] / "bin" / "mlx-k2"
    script.parent.mkdir()
    script.symlink_to(stand_in_python(tmp_path, "echo"))
    (hosts.homes[1] / ".profile").write_text('PATH="$HOME/bin:$PATH"\n')
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    log: list[str] = []
    with StageGroup([StageLocation("host-1")], LEASE_S, log.append) as group:
        assert group.receive(EVENT_TIMEOUT_S) == StageMessage(0, Connected())
    assert any("/nowhere/python cannot run mlx_k2 there; trying mlx-k2" in line for line in log)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unknown-key", "ssh does not know its host key: run `ssh unknown-key` once and accept it, or `ssh-keyscan"),
        ("changed-key", "its host key is not the one that ssh knows: .* `ssh-keygen -R changed-key`"),
        ("refused-key", "it refused this user's key: run `ssh-copy-id refused-key`"),
        ("refused-connection", "it accepts no ssh connections: switch on Remote Login"),
        ("unreachable", "it cannot be reached: .* `ping unreachable`"),
        ("unresolvable", "its name cannot be resolved: check its spelling"),
    ],
)
def test_the_error_for_each_failure_of_ssh_advises_what_to_do(hosts: EmulatedHosts, name: str, reason: str) -> None:
    error = end_of_start(StageLocation(name)).as_error()
    assert isinstance(error, StageStartError)
    assert re.match(f"stage 0 on {name} did not start: {reason}", str(error))


def test_stopping_does_not_wait_for_an_unreachable_host(hosts: EmulatedHosts) -> None:
    with StageGroup([StageLocation("unreachable")], LEASE_S, lambda _: None) as group:
        assert wait_until(lambda: bool(hosts.processes(0)), EVENT_TIMEOUT_S)
        lines: list[str] = []
        group.stop(lines.append)
        # The ssh client was ended at once: until its own timeout the group would have sent a signal.
        assert not any(GROUP_SENDS_SIGNAL in line for line in lines)
    assert hosts.all_processes() == {}


@follows_advice(
    'give the path of a Python that has mlx_k2 as "python" in the hostfile',
)
def test_the_error_for_a_missing_python_has_the_commands_that_install_mlx_k2(hosts: EmulatedHosts) -> None:
    assert end_of_start(StageLocation("host-1", "/nowhere/python")).reason == (
        f"it has no /nowhere/python: {install_commands('host-1', 'python3')}, "
        'or give the path of a Python that has mlx_k2 as "python" in the hostfile'
    )


def test_the_error_for_a_python_without_mlx_k2_has_the_commands_that_install_it(
    hosts: EmulatedHosts, tmp_path: Path
) -> None:
    python = tmp_path / "bare-python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    assert end_of_start(StageLocation("host-1", str(python))).reason == (
        f"its {python} has no mlx_k2: {install_commands('host-1', str(python))}"
    )


def test_the_error_for_a_host_where_no_python_works_names_what_was_tried(
    hosts: EmulatedHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    reason = end_of_start(StageLocation("host-1")).reason
    assert reason.startswith("neither /nowhere/python nor mlx-k2 on its login shell's PATH can be run there: run `make")
