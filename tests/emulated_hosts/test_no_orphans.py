"""Tests that no process remains on a host after the coordinator was killed or the host's cable was pulled."""

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mlx_k2.launch.group import HEARTBEAT_S
from tests.emulated_hosts import ring_group
from tests.emulated_hosts.hosts import EmulatedHosts, wait_until
from tests.launch.guarded import stand_in_python

pytestmark = pytest.mark.slow

LEASE_S = 4.0
LONG_LEASE_S = 600.0
"""A lease longer than every test, so that no stage ends because its lease is over."""

END_TIMEOUT_S = 60.0
"""Deadline for the end of all processes, long enough for a busy machine."""

SITUATIONS = ("idle", "init", "recv")
"""The situations of ring_group.py."""


def start_coordinator(hosts: EmulatedHosts, folder: Path, situation: str, lease_s: float) -> subprocess.Popen[bytes]:
    """Start a coordinator on host 0 and return it when its stages are in ``situation``."""
    host_arguments = [f"{name}={address}" for name, address in zip(hosts.names, hosts.addresses, strict=True)]
    python = stand_in_python(folder, "ring")
    process = hosts.exec(
        0,
        [sys.executable, ring_group.__file__, situation, python, str(lease_s), *host_arguments],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
    if situation == "init":
        assert wait_until(lambda: listens(stage_on(hosts, 1), ring_group.RING_PORT), END_TIMEOUT_S)
    if situation == "recv":  # a pending receive uses CPU time
        stage = stage_on(hosts, 1)
        user_s_before = stage.cpu_times().user
        assert wait_until(lambda: bool(stage.cpu_times().user > user_s_before + 0.3), END_TIMEOUT_S)
    return process


def stage_on(hosts: EmulatedHosts, i: int) -> psutil.Process:
    (pid,) = [pid for pid, command in hosts.processes(i).items() if "stage_programs.py" in command]
    return psutil.Process(pid)


def listens(process: psutil.Process, port: int) -> bool:
    """Return whether any process in the network of ``process`` listens on ``port``."""
    sockets = Path(f"/proc/{process.pid}/net/tcp").read_text()
    return re.search(rf":{port:04X} \S+ 0A ", sockets) is not None  # state 0A is LISTEN


@pytest.mark.parametrize("situation", SITUATIONS)
def test_no_process_remains_on_any_host_after_the_coordinator_was_killed(
    emulated_hosts: EmulatedHosts, tmp_path: Path, situation: str
) -> None:
    coordinator = start_coordinator(emulated_hosts, tmp_path, situation, LONG_LEASE_S)
    assert all(emulated_hosts.processes(i) for i in range(3))
    coordinator.kill()
    coordinator.wait()
    assert wait_until(lambda: not emulated_hosts.all_processes(), END_TIMEOUT_S), emulated_hosts.all_processes()


@pytest.mark.parametrize("situation", SITUATIONS)
def test_no_process_remains_on_a_host_whose_cable_was_pulled_after_the_lease(
    emulated_hosts: EmulatedHosts, tmp_path: Path, situation: str
) -> None:
    coordinator = start_coordinator(emulated_hosts, tmp_path, situation, LEASE_S)
    assert emulated_hosts.processes(1)
    cut_at = time.monotonic()
    emulated_hosts.cut(1)
    assert wait_until(lambda: not emulated_hosts.processes(1), END_TIMEOUT_S), emulated_hosts.processes(1)
    # Ended by the lease, not earlier. The last heartbeat is older than the cut; 0.5 s are a tolerance.
    assert time.monotonic() - cut_at > LEASE_S - HEARTBEAT_S - 0.5
    coordinator.terminate()
    coordinator.wait()
    assert wait_until(lambda: not emulated_hosts.all_processes(), END_TIMEOUT_S), emulated_hosts.all_processes()
