"""The whole program over real ssh on three hosts."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import EmulatedHosts, wait_until
from tests.local_cluster import write_model

MLX_K2 = str(Path(sys.executable).with_name("mlx-k2"))


def generate(hosts: EmulatedHosts, *options: str) -> subprocess.Popen[bytes]:
    """``mlx-k2 generate`` on host 0."""
    command = [MLX_K2, "generate", "Hello", "--seed", "1", *options]
    return hosts.exec(0, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


@pytest.fixture
def hostfile(emulated_hosts: EmulatedHosts, tmp_path: Path) -> str:
    return str(emulated_hosts.write_hostfile(tmp_path / "hosts.json"))


def test_three_hosts_say_what_one_stage_says(emulated_hosts: EmulatedHosts, hostfile: str) -> None:
    alone, _ = generate(emulated_hosts, "--max-tokens", "30", "--stages", "1").communicate()
    together, log = generate(emulated_hosts, "--max-tokens", "30", "--hostfile", hostfile).communicate()
    assert together == alone != b"", log.decode()
    assert all(name in log.decode() for name in emulated_hosts.names)
    assert emulated_hosts.all_processes() == {}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
def test_no_process_is_left_when_the_command_is_ended_in_the_middle_of_an_answer(
    emulated_hosts: EmulatedHosts, hostfile: str, tmp_path: Path, number: signal.Signals
) -> None:
    endless = str(write_model(tmp_path / "model"))
    command = generate(emulated_hosts, "--max-tokens", "1500", "--hostfile", hostfile, "--model", endless)
    assert command.stdout
    assert command.stdout.read(20)
    assert all(emulated_hosts.processes(i) for i in range(3))
    command.send_signal(number)
    began = time.monotonic()
    assert wait_until(lambda: not emulated_hosts.all_processes(), 5), emulated_hosts.all_processes()
    if number != signal.SIGKILL:
        assert time.monotonic() - began < 2
    command.communicate()
    assert command.returncode == (-number if number == signal.SIGKILL else 128 + number)
