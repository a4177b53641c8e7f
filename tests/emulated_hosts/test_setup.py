"""Tests of `mlx-k2 setup` over real ssh on three hosts: answers in a terminal, failures, repetition, and the result."""

import functools
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mlx_k2.launch.remote_install import INSTALL_FOLDER, survey
from tests.emulated_hosts.hosts import EmulatedHosts
from tests.emulated_hosts.test_generate import MLX_K2
from tests.pty_command import on_pty
from tests.stub_wheels import write_stub_wheels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TIMEOUT_S = 240.0
HOSTS = ("this", "host-1", "host-2")


def run(hosts: EmulatedHosts, *arguments: str) -> tuple[int, str]:
    """Run mlx-k2 on host 0 without a terminal; return its exit code and its output."""
    process = hosts.exec(
        0, [MLX_K2, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output.decode()


def existing_paths(hosts: EmulatedHosts) -> list[Path]:
    """Return the paths in the homes that exist, of those that setup creates."""
    paths = [*(home / ".local" for home in hosts.homes), hosts.homes[0] / ".config"]
    return [path for path in paths if path.exists()]


def test_setup_asks_before_each_change_and_resumes_after_a_failure_of_one_host(
    emulated_hosts: EmulatedHosts, tmp_path: Path
) -> None:
    hosts = emulated_hosts
    wheels = str(write_stub_wheels(tmp_path / "wheels"))
    options = ("--python", sys.executable, "--wheels", wheels)
    start_setup = functools.partial(hosts.exec, 0, [MLX_K2, "setup", *options])

    with on_pty(start_setup) as pane:
        pane.wait_for("in the order of their layers")
        pane.type("this host-1 host-2")
        table = pane.wait_for("Install mlx-k2")
        assert all(name in table for name in ("this machine", "host-1", "host-2", "not installed")), table
        pane.type("n")
        pane.wait_for("nothing was changed")
        pane.wait_for("error: the answer was no")
        assert pane.end() == 2
    assert existing_paths(hosts) == []

    with on_pty(start_setup) as pane:
        pane.wait_for("in the order of their layers")
        pane.type("host-1")
        pane.wait_for("there? [y/N]")
        pane.type("y")
        pane.wait_for("installing on host-1")
        pane.press(b"\x03")
        pane.wait_for("the installation on host-1 was begun and not finished")
        pane.wait_for("run the same command again to go on")
        assert pane.end() == 130

    (hosts.homes[2] / ".local").write_text("a file where a folder has to be")
    with on_pty(start_setup) as pane:
        pane.wait_for("in the order of their layers")
        pane.type("this host-1 host-2")
        pane.wait_for("there? [y/N]")
        pane.type("y")
        pane.wait_for("is installed on host-1", TIMEOUT_S)
        pane.wait_for("run the same command again to go on", TIMEOUT_S)
        pane.wait_for("error: not installed on host-2: ")
        assert pane.end() == 1
    # the second is the file above, not a folder of setup
    assert existing_paths(hosts) == [hosts.homes[1] / ".local", hosts.homes[2] / ".local"]
    (hosts.homes[2] / ".local").unlink()

    with on_pty(functools.partial(hosts.exec, 0, [MLX_K2, "setup", *HOSTS, *options, "-m", "built-in"])) as pane:
        assert "on host-2, in ~/" in pane.wait_for("there? [y/N]")  # and not on host-1, where it is installed
        pane.type("y")
        pane.wait_for("is installed on host-2", TIMEOUT_S)
        pane.wait_for("GB/s", TIMEOUT_S)
        pane.wait_for("config.toml?")
        pane.wait_for("[y/N]")
        pane.type("y")
        pane.wait_for("written: ")
        pane.wait_for("0 failure", TIMEOUT_S)
        pane.wait_for("next: mlx-k2 chat")
        assert pane.end() == 0
    config = tomllib.loads((hosts.homes[0] / ".config" / "mlx-k2" / "config.toml").read_text())
    assert config == {"hostfile": str(hosts.homes[0] / ".config" / "mlx-k2" / "hosts.json"), "model": "built-in"}
    entries = json.loads(Path(config["hostfile"]).read_text())
    assert [entry["ssh"] for entry in entries] == ["127.0.0.1", "host-1", "host-2"]
    pythons = [f"{home}/{INSTALL_FOLDER}/env/bin/python" for home in hosts.homes]
    assert [entry.get("python") for entry in entries[1:]] == pythons[1:]
    # All addresses are of one network, whichever was measured as the faster.
    assert tuple(entry["ips"][0] for entry in entries) in (hosts.addresses, hosts.data_addresses)

    code, output = run(hosts, "setup", *HOSTS, *options)
    assert (code, "written" in output, "Install mlx-k2" in output) == (0, False, False), output
    code, output = run(hosts, "generate", "What is 17 plus 25?")
    assert code == 0 and "17 + 25 = 42" in output, output
    code, output = run(hosts, "config")
    # `mlx-k2 config` names the line of each value
    assert "config.toml, line 2" in output and "hosts.json" in output, output
    assert hosts.all_processes() == {}


def test_hosts_that_cannot_be_used_are_named_with_advice_and_nothing_is_changed(
    emulated_hosts: EmulatedHosts,
) -> None:
    hosts = emulated_hosts
    code, output = run(hosts, "setup", "host-0", "refused-key", "unknown-key", "--yes")
    assert code == 2
    assert "refused-key: it refused this user's key: run `ssh-copy-id refused-key`" in output
    assert "unknown-key: ssh does not know its host key" in output
    assert "nothing was changed" in output
    old_python = hosts.folder / "python3.9"
    # It prints what Apple's Python prints for `survey`: its version, whether it has pip, its path.
    old_python.write_text('#!/bin/sh\necho "3.9.6 pip /usr/bin/python3"\n')
    old_python.chmod(0o755)
    code, output = run(hosts, "setup", "host-1", "--python", str(old_python), "--yes")
    assert code == 2
    assert "its newest Python is 3.9.6 (/usr/bin/python3, which comes with macOS) and mlx-k2 needs 3.11" in output
    assert existing_paths(hosts) == []


def test_without_a_terminal_and_without_yes_nothing_is_changed(emulated_hosts: EmulatedHosts) -> None:
    hosts = emulated_hosts
    code, output = run(hosts, "setup", "host-1", "host-2", "--python", sys.executable)
    assert (code, "nobody can be asked here" in output) == (2, True), output
    assert existing_paths(hosts) == []


def test_a_survey_over_ssh_finds_a_python_in_the_home_of_the_host(
    emulated_hosts: EmulatedHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{emulated_hosts.ssh_folder(0)}:/usr/bin:/bin")
    bin_folder = emulated_hosts.homes[1] / ".local" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python3.11").symlink_to(sys.executable)
    host = survey("host-1")
    assert host.python is not None and host.problem is None
    assert host.home == str(emulated_hosts.homes[1])
    assert host.memory_bytes > 10**9
    assert host.system.startswith("Linux")
