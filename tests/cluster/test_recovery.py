"""Streams over real ssh on three hosts while a cable or an ssh server is lost: who is blamed, and how soon."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.hosts import EmulatedHosts, wait_until
from tests.cluster.test_generate import generate

MAX_TOKENS = "80"


def kill_ssh_session(hosts: EmulatedHosts) -> None:
    (guard,) = [pid for pid, command in hosts.processes(1).items() if command.endswith("-m mlx_k2.stage")]
    session = psutil.Process(guard).parent()
    assert session is not None and session.name().startswith("sshd")
    session.kill()


def cut_and_restore(hosts: EmulatedHosts) -> None:
    """Pull the cable until the stage behind it is gone."""
    hosts.cut(1)
    assert wait_until(lambda: not hosts.processes(1), 30), hosts.processes(1)
    hosts.restore(1)


FAULTS: dict[str, tuple[Callable[[EmulatedHosts], object], float, str]] = {
    "ssh server killed": (kill_ssh_session, 1.5, "the ssh connection was lost"),
    "cable pulled": (cut_and_restore, 12.0, ""),
}


def next_line(command: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert command.stdout
    line: dict[str, Any] = json.loads(command.stdout.readline())
    return line


@pytest.mark.parametrize("fault", FAULTS)
def test_the_stream_goes_on_and_the_host_that_was_lost_is_blamed_alone(
    emulated_hosts: EmulatedHosts, tmp_path: Path, fault: str
) -> None:
    hosts = emulated_hosts
    hostfile = str(hosts.write_hostfile(tmp_path / "hosts.json"))
    alone = generate(hosts, "--max-tokens", MAX_TOKENS, "--stages", "1", "--json")
    expected = [json.loads(line) for line in alone.communicate()[0].splitlines()]
    lease_s = "4" if fault == "cable pulled" else "20"
    options = ("--json", "--hostfile", hostfile, "--lease", lease_s, "--max-tokens", MAX_TOKENS)
    command = generate(hosts, *options)
    lines = [next_line(command) for _ in range(5)]
    break_it, noticed_within_s, words = FAULTS[fault]
    began = time.monotonic()
    break_it(hosts)
    while "restart" not in lines[-1]:
        lines.append(next_line(command))
    noticed_s = time.monotonic() - began
    reason = lines[-1]["restart"]["reason"]
    assert reason.startswith("stage 1 on host-1") and words in reason, reason
    assert noticed_s < noticed_within_s
    rest, said = command.communicate(timeout=90)
    lines += [json.loads(line) for line in rest.splitlines()]
    assert command.returncode == 0, said.decode()
    assert [line for line in lines if "token" in line] == [line for line in expected if "token" in line]
    assert wait_until(lambda: not hosts.all_processes(), 5), hosts.all_processes()
