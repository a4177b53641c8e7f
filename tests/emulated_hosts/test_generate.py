"""Tests of `mlx-k2 generate` over real ssh on three hosts."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulated_hosts.hosts import EmulatedHosts, wait_until
from tests.local_cluster import write_model

pytestmark = pytest.mark.slow

MLX_K2 = str(Path(sys.executable).with_name("mlx-k2"))

END_TIMEOUT_S = 60.0
"""Deadline for the end of all processes, long enough for a busy machine."""

LONG_LEASE = ("--lease", "600")
"""A lease longer than every test, so that no stage ends because its lease is over."""


def start_generate(hosts: EmulatedHosts, *options: str) -> subprocess.Popen[bytes]:
    """Start ``mlx-k2 generate`` on host 0."""
    command = [MLX_K2, "generate", "Hello", "--seed", "1", *options]
    return hosts.exec(0, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


@pytest.fixture
def hostfile(emulated_hosts: EmulatedHosts, tmp_path: Path) -> str:
    return str(emulated_hosts.write_hostfile(tmp_path / "hosts.json"))


def test_three_hosts_give_the_same_answer_as_one_stage(emulated_hosts: EmulatedHosts, hostfile: str) -> None:
    of_one, _ = start_generate(emulated_hosts, "--max-tokens", "30", "--stages", "1").communicate()
    three = start_generate(emulated_hosts, "--max-tokens", "30", "--hostfile", hostfile, "--verbose")
    of_three, log = three.communicate()
    assert of_three == of_one != b"", log.decode()
    assert all(name in log.decode() for name in emulated_hosts.names)
    assert emulated_hosts.all_processes() == {}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
def test_a_signal_during_an_answer_leaves_no_process_on_any_host(
    emulated_hosts: EmulatedHosts, hostfile: str, tmp_path: Path, number: signal.Signals
) -> None:
    model = str(write_model(tmp_path / "model"))
    options = ("--max-tokens", "1500", "--hostfile", hostfile, "--model", model, *LONG_LEASE)
    command = start_generate(emulated_hosts, *options)
    assert command.stdout
    assert command.stdout.read(20)
    assert all(emulated_hosts.processes(i) for i in range(3))
    command.send_signal(number)
    assert wait_until(lambda: not emulated_hosts.all_processes(), END_TIMEOUT_S), emulated_hosts.all_processes()
    command.communicate()
    assert command.returncode == (-number if number == signal.SIGKILL else 128 + number)
