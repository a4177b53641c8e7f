"""Several hosts on one Linux machine: a network namespace, two addresses, a name, a home and an sshd for each.

They share only the file system and the user. Everything is made in a folder of the test and in namespaces named after
this process, so that several test runs do not collide, and everything is removed again. Needs root.
"""

import json
import os
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
START_S = 15.0

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

SSH_CONFIG_FIRST = """\
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
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds


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
        _remove_left_overs()
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
        enter = ["ip", "netns", "exec", self._spaces[i], "unshare", "--uts"]
        named = ["sh", "-c", f'hostname {self.names[i]}; exec "$@"', "sh"]
        environment = {
            **os.environ,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "HOME": str(self.homes[i]),
            "XDG_CACHE_HOME": str(self.homes[i] / ".cache"),
            "MLX_K2_CONFIG": "",
            **(env or {}),
        }
        return subprocess.Popen([*enter, *named, *command], env=environment, **options)

    def ssh_folder(self, i: int) -> Path:
        """Return a folder for the PATH of a process outside the hosts: the ``ssh`` in it connects from host i."""
        return self.folder / f"bin-{i}"

    def processes(self, i: int) -> dict[int, str]:
        """Return the pid and command line of every process on host i except its sshd."""
        found = {}
        for pid in _pids(self._spaces[i]):
            try:
                process = psutil.Process(pid)
                name, command = process.name(), " ".join(process.cmdline())
                alive = process.status() != psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                continue
            if alive and not name.startswith("sshd"):
                found[pid] = command
        return found

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
            shape = ["tbf", "rate", f"{kilobits}kbit", "burst", "3kb", "latency", "2s"]
            subprocess.run(["tc", "-n", space, "qdisc", "add", "dev", link, "root", *shape], check=True)

    def num_delayed_packets(self, i: int) -> int:
        """Return how many packets were delayed since ``slow``."""
        shown = subprocess.run(["tc", "-s", "-n", self._spaces[i], "qdisc", "show", "dev", "eth0"], capture_output=True)
        (count,) = [words[words.index(b"overlimits") + 1] for words in [shown.stdout.split()]]
        return int(count)

    def end_sshd(self, i: int) -> None:
        """Kill host i's sshd and the server processes of its sessions."""
        for pid in _pids(self._spaces[i]):
            with suppress(psutil.NoSuchProcess):
                if (process := psutil.Process(pid)).name().startswith("sshd"):
                    process.kill()
        self._sshds.pop(i).wait(START_S)

    def start_sshd(self, i: int) -> None:
        """Start host i's sshd again."""
        self._log_of(i).unlink()
        self._start_sshd(i)
        self._await_sshd(i)

    def write_hostfile(self, path: Path, ranks: Sequence[int] | None = None, **more: object) -> Path:
        """Write a hostfile in MLX's list form, with one entry for each of ``ranks`` and the fields ``more``."""
        entries = [
            {"ssh": self.names[i], "ips": [self.addresses[i]], **more}
            for i in (range(len(self.names)) if ranks is None else ranks)
        ]
        path.write_text(json.dumps(entries))
        return path

    # ---- setup and removal

    def _write_keys_and_configs(self) -> None:
        keys = ["user-key", "other-key", *(f"{name}-key" for name in self.names)]
        for key in keys:
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", self.folder / key], check=True
            )
        public = {key: " ".join((self.folder / f"{key}.pub").read_text().split()[:2]) for key in keys}
        known = [f"{address} {public[f'{name}-key']}" for name, address in zip(self.names, self.addresses, strict=True)]
        (self.folder / "known_hosts").write_text("\n".join(known) + "\n")
        (self.folder / "changed_known_hosts").write_text(f"{self.addresses[1]} {public['other-key']}\n")
        self._write_ssh_config()
        for name, address, home in zip(self.names, self.addresses, self.homes, strict=True):
            home.mkdir()
            (self.folder / f"{name}.sshd_config").write_text(
                SSHD_CONFIG.format(address=address, folder=self.folder, home=home, host_key=self.folder / f"{name}-key")
            )

    def _write_ssh_config(self) -> None:
        good = {"folder": self.folder, "port": 22, "identity": "user-key", "known_hosts": self.folder / "known_hosts"}
        first = {**good, "address": self.addresses[1]}
        entries: list[dict[str, object]] = [
            {**good, "name": name, "address": address} for name, address in zip(self.names, self.addresses, strict=True)
        ]
        entries += [
            {**first, "name": "unknown-key", "known_hosts": "/dev/null"},
            {**first, "name": "changed-key", "known_hosts": self.folder / "changed_known_hosts"},
            {**first, "name": "refused-key", "identity": "other-key"},
            {**first, "name": "refused-connection", "port": 2222},
            {**good, "name": "unreachable", "address": "10.77.0.200"},
            {**good, "name": "unresolvable", "address": "nobody.invalid"},
        ]
        text = SSH_CONFIG_FIRST + "".join(SSH_CONFIG.format(**entry) for entry in entries)
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
        for bridge, link, ends, addresses in (
            ("br0", "eth0", "a", self.addresses),
            ("br1", "eth1", "b", self.data_addresses),
        ):
            _ip("-n", self._hub, "link", "add", bridge, "type", "bridge")
            _ip("-n", self._hub, "link", "set", bridge, "up")
            for i, (space, address) in enumerate(zip(self._spaces, addresses, strict=True)):
                end = f"{ends}{i}"
                _ip("link", "add", end, "netns", self._hub, "type", "veth", "peer", "name", link, "netns", space)
                _ip("-n", self._hub, "link", "set", end, "master", bridge, "up")
                _ip("-n", space, "addr", "add", f"{address}/24", "dev", link)
                _ip("-n", space, "link", "set", link, "up")

    def _log_of(self, i: int) -> Path:
        return self.folder / f"{self.names[i]}.sshd.log"

    def _start_sshd(self, i: int) -> None:
        command = [SSHD, "-D", "-f", str(self.folder / f"{self.names[i]}.sshd_config"), "-E", str(self._log_of(i))]
        self._sshds[i] = self.exec(i, command, stdin=subprocess.DEVNULL)

    def _await_sshd(self, i: int) -> None:
        log = self._log_of(i)
        listening = wait_until(lambda: log.exists() and "listening" in log.read_text(), START_S)
        assert listening, f"sshd did not start: {log.read_text() if log.exists() else 'no log'}"

    def close(self) -> None:
        """End every process on the hosts and remove the hosts."""
        _remove((self._hub, *self._spaces))
        for sshd in self._sshds.values():
            sshd.wait(START_S)


def _write_script(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _pids(space: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def _spaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    return [line.split()[0] for line in listed.stdout.splitlines() if line]


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


def _remove_left_overs() -> None:
    """Remove the hosts of test runs that were killed."""
    ours = [space.split("-") for space in _spaces() if space.startswith(f"{PREFIX}-")]
    _remove(["-".join(parts) for parts in ours if parts[1].isdigit() and not psutil.pid_exists(int(parts[1]))])
