"""Several hosts on one Linux machine: a network namespace, two addresses, a name, a home and an sshd for each.

They share the file system, the user and the process ids. Their files are in a folder of the test, and the names of
their namespaces contain the pid of this process, so that several test runs do not collide. Needs root.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

SSHD = "/usr/sbin/sshd"
PREFIX = "k2"
"""Start of the name of each namespace."""
SSHD_TIMEOUT_S = 15.0

SSHD_CONFIG = """\
ListenAddress {address}:22
HostKey {host_key}
AuthorizedKeysFile {folder}/user-key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
PrintMotd no
PidFile none
SetEnv HOME={home} XDG_CACHE_HOME={home}/.cache
"""

SSH_CONFIG_OF_ALL = """\
Host *
  User root
  IdentitiesOnly yes
  GlobalKnownHostsFile /dev/null
"""

SSH_CONFIG = """\
Host {name}
  HostName {address}
  Port {port}
  IdentityFile {folder}/{identity}
  UserKnownHostsFile {known_hosts}
"""


def what_is_missing() -> str | None:
    """Return what this machine lacks to emulate hosts and how to get it, or None."""
    if os.geteuid() != 0:
        return "needs emulated hosts: run the tests as root"
    programs = (SSHD, "ssh", "ssh-keygen", "ip", "unshare")
    if missing := [program for program in programs if shutil.which(program) is None]:
        return f"needs emulated hosts: apt-get install openssh-server iproute2 ({', '.join(missing)} not found)"
    trial = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    if trial.returncode:
        return f"needs emulated hosts: run in a privileged container ({trial.stderr.strip()})"
    return None


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait up to ``timeout_s`` for ``condition`` and return whether it became true."""
    deadline = time.monotonic() + timeout_s
    while not (is_true := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return is_true


class EmulatedHosts:
    """A context manager: on entry the hosts are up and reachable by ssh from each other, on exit they are removed.

    ssh connects to host i by the name ``names[i]``, at ``addresses[i]`` on its cable eth0. ``data_addresses[i]`` is on
    a second cable, eth1. Further ssh names fail: ``unknown-key``, ``changed-key``, ``refused-key`` and
    ``refused-connection`` are names of host 1; ``unreachable`` and ``unresolvable`` belong to no host.
    """

    def __init__(self, folder: Path, num_hosts: int) -> None:
        self.folder = folder
        self.names = tuple(f"host-{i}" for i in range(num_hosts))
        self.addresses = tuple(f"10.77.0.{i + 1}" for i in range(num_hosts))
        self.data_addresses = tuple(f"10.78.0.{i + 1}" for i in range(num_hosts))
        self.homes = tuple(folder / name for name in self.names)
        self._spaces = tuple(f"{PREFIX}-{os.getpid()}-{i}" for i in range(num_hosts))
        self._hub = f"{PREFIX}-{os.getpid()}-hub"
        self._sshds: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "EmulatedHosts":
        _remove_hosts_of_killed_runs()
        try:
            self._write_keys_and_configs()
            self._make_network()
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd needs it for its privilege separation
            for i in range(len(self.names)):
                self._start_sshd(i)
            for i in range(len(self.names)):
                self._await_sshd(i)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- actions of a test

    def exec(
        self, i: int, command: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start ``command`` on host i. The returned process has the command's pid. ``options`` are Popen's."""
        enter_namespaces = ["ip", "netns", "exec", self._spaces[i], "unshare", "--uts"]
        set_hostname = ["sh", "-c", f'hostname {self.names[i]}; exec "$@"', "sh"]
        environment = {
            **os.environ,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "HOME": str(self.homes[i]),
            "XDG_CACHE_HOME": str(self.homes[i] / ".cache"),
            "MLX_K2_CONFIG": "",
            **(env or {}),
        }
        return subprocess.Popen([*enter_namespaces, *set_hostname, *command], env=environment, **options)

    def ssh_folder(self, i: int) -> Path:
        """Return a folder for the PATH of a process outside the hosts: the ``ssh`` in it connects from host i."""
        return self.folder / f"bin-{i}"

    def processes(self, i: int) -> dict[int, str]:
        """Return the pid and command line of every process on host i except its sshd."""
        commands = {}
        for pid in _pids(self._spaces[i]):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                command = " ".join(process.cmdline())
                if process.status() != psutil.STATUS_ZOMBIE and not process.name().startswith("sshd"):
                    commands[pid] = command
        return commands

    def all_processes(self) -> dict[int, str]:
        """Return the pid and command line of every process on all hosts except the sshds."""
        return {pid: command for i in range(len(self.names)) for pid, command in self.processes(i).items()}

    def cut(self, i: int, link: str = "eth0") -> None:
        """Pull the cable ``link`` of host i."""
        _ip("-n", self._spaces[i], "link", "set", link, "down")

    def restore(self, i: int, link: str = "eth0") -> None:
        """Plug in the cable ``link`` of host i again."""
        _ip("-n", self._spaces[i], "link", "set", link, "up")

    def slow(self, i: int, kilobits: int) -> None:
        """Limit host i's cable eth0 to ``kilobits`` per second in each direction."""
        for space, link in ((self._spaces[i], "eth0"), (self._hub, f"a{i}")):
            token_bucket_filter = ["tbf", "rate", f"{kilobits}kbit", "burst", "3kb", "latency", "2s"]
            subprocess.run(["tc", "-n", space, "qdisc", "add", "dev", link, "root", *token_bucket_filter], check=True)

    def num_delayed_packets(self, i: int) -> int:
        """Return the number of packets that host i has sent late since ``slow``."""
        tc = subprocess.run(["tc", "-s", "-n", self._spaces[i], "qdisc", "show", "dev", "eth0"], capture_output=True)
        words = tc.stdout.split()
        return int(words[words.index(b"overlimits") + 1])

    def end_sshd(self, i: int) -> None:
        """Kill host i's sshd and the server processes of its sessions."""
        for pid in _pids(self._spaces[i]):
            with suppress(psutil.NoSuchProcess):
                if (process := psutil.Process(pid)).name().startswith("sshd"):
                    process.kill()
        self._sshds.pop(i).wait(SSHD_TIMEOUT_S)

    def start_sshd(self, i: int) -> None:
        """Start host i's sshd again."""
        self._log_of(i).unlink()
        self._start_sshd(i)
        self._await_sshd(i)

    def write_hostfile(self, path: Path) -> Path:
        """Write a hostfile in MLX's list form with all hosts; return its path."""
        entries = [{"ssh": name, "ips": [address]} for name, address in zip(self.names, self.addresses, strict=True)]
        path.write_text(json.dumps(entries))
        return path

    # ---- setup and removal

    def _write_keys_and_configs(self) -> None:
        keys = ["user-key", "other-key", *(f"{name}-key" for name in self.names)]
        for key in keys:
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", self.folder / key], check=True
            )
        public_keys = {key: " ".join((self.folder / f"{key}.pub").read_text().split()[:2]) for key in keys}
        known_hosts = [
            f"{address} {public_keys[f'{name}-key']}\n"
            for name, address in zip(self.names, self.addresses, strict=True)
        ]
        (self.folder / "known_hosts").write_text("".join(known_hosts))
        (self.folder / "changed_known_hosts").write_text(f"{self.addresses[1]} {public_keys['other-key']}\n")
        self._write_ssh_config()
        for name, address, home in zip(self.names, self.addresses, self.homes, strict=True):
            home.mkdir()
            (self.folder / f"{name}.sshd_config").write_text(
                SSHD_CONFIG.format(address=address, folder=self.folder, home=home, host_key=self.folder / f"{name}-key")
            )

    def _write_ssh_config(self) -> None:
        host = {"folder": self.folder, "port": 22, "identity": "user-key", "known_hosts": self.folder / "known_hosts"}
        host_1 = host | {"address": self.addresses[1]}
        entries: list[dict[str, object]] = [
            host | {"name": name, "address": address} for name, address in zip(self.names, self.addresses, strict=True)
        ]
        entries += [
            host_1 | {"name": "unknown-key", "known_hosts": "/dev/null"},
            host_1 | {"name": "changed-key", "known_hosts": self.folder / "changed_known_hosts"},
            host_1 | {"name": "refused-key", "identity": "other-key"},
            host_1 | {"name": "refused-connection", "port": 2222},
            host | {"name": "unreachable", "address": "10.77.0.200"},
            host | {"name": "unresolvable", "address": "nobody.invalid"},
        ]
        text = SSH_CONFIG_OF_ALL + "".join(SSH_CONFIG.format(**entry) for entry in entries)
        (self.folder / "ssh_config").write_text(text)
        ssh = f"{shutil.which('ssh')} -F {self.folder}/ssh_config"
        _write_script(self.folder / "bin" / "ssh", f'exec {ssh} "$@"')
        for i, space in enumerate(self._spaces):
            _write_script(self.ssh_folder(i) / "ssh", f'exec ip netns exec {space} {ssh} "$@"')

    def _make_network(self) -> None:
        _ip("netns", "add", self._hub)
        for space in self._spaces:
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        for bridge, link, port_prefix, addresses in (
            ("br0", "eth0", "a", self.addresses),
            ("br1", "eth1", "b", self.data_addresses),
        ):
            _ip("-n", self._hub, "link", "add", bridge, "type", "bridge")
            _ip("-n", self._hub, "link", "set", bridge, "up")
            for i, (space, address) in enumerate(zip(self._spaces, addresses, strict=True)):
                port = f"{port_prefix}{i}"
                _ip("link", "add", port, "netns", self._hub, "type", "veth", "peer", "name", link, "netns", space)
                _ip("-n", self._hub, "link", "set", port, "master", bridge, "up")
                _ip("-n", space, "addr", "add", f"{address}/24", "dev", link)
                _ip("-n", space, "link", "set", link, "up")

    def _log_of(self, i: int) -> Path:
        return self.folder / f"{self.names[i]}.sshd.log"

    def _start_sshd(self, i: int) -> None:
        command = [SSHD, "-D", "-f", str(self.folder / f"{self.names[i]}.sshd_config"), "-E", str(self._log_of(i))]
        self._sshds[i] = self.exec(i, command, stdin=subprocess.DEVNULL)

    def _await_sshd(self, i: int) -> None:
        log = self._log_of(i)
        is_listening = wait_until(lambda: log.exists() and "listening" in log.read_text(), SSHD_TIMEOUT_S)
        assert is_listening, f"sshd did not start: {log.read_text() if log.exists() else 'no log'}"

    def close(self) -> None:
        """End every process on the hosts and remove the hosts."""
        _remove((self._hub, *self._spaces))
        for sshd in self._sshds.values():
            sshd.wait(SSHD_TIMEOUT_S)


def _write_script(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _pids(space: str) -> list[int]:
    ip = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
    return [int(pid) for pid in ip.stdout.split()]


def _spaces() -> list[str]:
    ip = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    return [line.split()[0] for line in ip.stdout.splitlines() if line]


def _remove(spaces: Sequence[str]) -> None:
    for space in set(spaces) & set(_spaces()):
        while pids := _pids(space):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        try:
            _ip("netns", "del", space)
        except subprocess.CalledProcessError:  # another test process may have removed it meanwhile
            if space in _spaces():
                raise


def _remove_hosts_of_killed_runs() -> None:
    pids = {space: re.match(rf"{PREFIX}-(\d+)-", space) for space in _spaces()}
    _remove([space for space, pid in pids.items() if pid is not None and not psutil.pid_exists(int(pid[1]))])
