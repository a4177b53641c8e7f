"""Checks of the facts that hosts report: each result is ok, a warning or a failure, with the fix. Pure."""

import enum
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlx_k2.cluster.host_facts import HopSpeed, HostFacts, ModelFacts
from mlx_k2.cluster.hostfile import Backend, Host
from mlx_k2.cluster.mac_settings import (
    bridge_is_active,
    macos_version,
    rdma_devices,
    rdma_is_enabled,
    sleeps_after_minutes,
)
from mlx_k2.launch.ssh import install_versions
from mlx_k2.protocol.messages import Hello

MAX_ROUND_TRIP_S = 0.02  # limit of the control connection's round trip, which takes place for every token
MAX_CLOCK_SKEW_S = 5.0
MAX_HOP_S = 0.005  # limit of a hop's one-way time for one token
MIN_HOP_BYTES_PER_S = 100e6
"""A little less than Gigabit Ethernet, on which a prompt's chunk of 29 MB takes 0.25 s per hop."""
RDMA_MACOS = (26, 2)  # the first macOS with RDMA
LARGE_RDMA_MACOS = (26, 3)  # the first macOS with RDMA messages of more than 4 kB
_FAST_SYNCH = "MLX_METAL_FAST_SYNCH"


class CheckResult(enum.Enum):
    """The result of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


OK, WARNING, FAILURE = CheckResult.OK, CheckResult.WARNING, CheckResult.FAILURE


@dataclass(frozen=True)
class Check:
    """The outcome of one check of one host. ``message`` includes the fix, with commands between backticks."""

    name: str
    result: CheckResult
    message: str
    host: str = ""

    @property
    def commands(self) -> list[str]:
        """The commands to run; none if the result is OK."""
        return re.findall(r"`([^`]+)`", self.message) if self.result is not OK else []


def check_answer(round_trip_s: float, clock_ahead_s: float) -> Iterator[Check]:
    """Check that a host answers fast enough for one step plan per token, and that its clock is right.

    ``clock_ahead_s`` is the time on its clock less that on this machine's.
    """
    answer = f"answers in {1000 * round_trip_s:.1f} ms"
    if round_trip_s > MAX_ROUND_TRIP_S:
        yield Check("ssh", WARNING, f"{answer}: each token waits for that; use a cable, not Wi-Fi")
    else:
        yield Check("ssh", OK, answer)
    if abs(clock_ahead_s) > MAX_CLOCK_SKEW_S:
        fix = "set it: `sudo sntp -sS time.apple.com` there; logs will not match, nothing else depends on it"
        direction = "ahead of" if clock_ahead_s > 0 else "behind"
        yield Check("clock", WARNING, f"{abs(clock_ahead_s):.0f} s {direction} this machine's: {fix}")
    else:
        yield Check("clock", OK, f"within {MAX_CLOCK_SKEW_S:g} s of this machine's")


def check_versions(
    host: Host, hello: Hello, here: Mapping[str, str], backend: Backend, systems: set[str]
) -> Iterator[Check]:
    """Check that a host has the package versions of this machine (``here``), and that all ``systems`` are the same."""
    there = {"mlx-k2": hello.mlx_k2_version, "mlx": hello.mlx_version}
    differing = {name: here[name] for name in here if there[name] != here[name]}
    listed = ", ".join(f"{name} {there[name]}" for name in there)
    if differing:
        install = install_versions(None if host.is_local else host.ssh, host.python, differing)
        yield Check("versions", FAILURE, f"{listed}: install what this machine has: {install}")
    else:
        yield Check("versions", OK, f"{listed}, Python {hello.python_version}")
    if len(systems) > 1:
        result = WARNING if backend is Backend.RING else FAILURE
        yield Check("system", result, f"{hello.system}, and other hosts run another: update all to the same")
    else:
        yield Check("system", OK, hello.system)


def check_memory(hello: Hello, free_bytes: int, needed_bytes: int | None) -> Check:
    """Check that a host can hold its stage. ``needed_bytes`` None: the need is not known."""
    has_gpu = hello.working_set_bytes is not None
    limit_bytes = hello.memory_bytes if hello.working_set_bytes is None else hello.working_set_bytes
    kind = "GPU memory" if has_gpu else "memory"
    if needed_bytes is None:
        return Check("memory", OK, f"{_gb(limit_bytes)} of {kind}, {_gb(free_bytes)} not in use")
    if needed_bytes > limit_bytes:
        fix = "give --split, a smaller --context or another host"
        if has_gpu and needed_bytes < hello.memory_bytes:
            fix = f"run `sudo sysctl iogpu.wired_limit_mb={math.ceil(needed_bytes / 2**20)}` there, or {fix}"
        message = f"its stage needs {_gb(needed_bytes)} and {_gb(limit_bytes)} of {kind} may be held: {fix}"
        return Check("memory", FAILURE, message)
    if needed_bytes > free_bytes:
        message = f"its stage needs {_gb(needed_bytes)} and {_gb(free_bytes)} are not in use: end other programs there"
        return Check("memory", WARNING, message)
    return Check("memory", OK, f"its stage needs {_gb(needed_bytes)} of {_gb(limit_bytes)} of {kind}")


def check_model(facts: ModelFacts, download: str) -> Check:
    """Check that a stage's files are present and correct. ``download`` fetches them; '' if the model is a folder."""
    if facts.problem is not None:
        return Check("model", FAILURE, facts.problem)
    if facts.missing_bytes:
        message = f"{_gb(facts.missing_bytes)} of {facts.num_files} files are still to be fetched"
        if facts.missing_bytes > facts.disk_free_bytes:
            message += f", and its disk has {_gb(facts.disk_free_bytes)} free: free some, then run `{download}`"
            return Check("model", FAILURE, message)
        return Check("model", WARNING, f"{message}: run `{download}`")
    differing = sorted(name for name, digest in facts.expected.items() if facts.found.get(name, digest) != digest)
    if differing:
        fix = f"run `{download}`" if download else "copy it again"
        message = f"{', '.join(differing)} in {facts.folder} is not what the Hub has: remove it and {fix}"
        return Check("model", FAILURE, message)
    num_equal = sum(name in facts.found for name in facts.expected)
    if num_equal:
        comparison = f"{num_equal} of them right by their checksums"
    elif facts.found:
        comparison = "not compared: none was known before"
    elif facts.expected:
        comparison = f"{len(facts.expected)} of them with known checksums"
    else:
        comparison = "not compared"
    return Check("model", OK, f"{facts.num_files} files in {facts.folder}, {comparison}")


def check_copies(facts: Mapping[str, ModelFacts]) -> Iterator[Check]:
    """Yield failures for files whose computed checksums differ between hosts. ``facts`` is by host.

    Hosts with the most frequent checksum pass, except that of two hosts both fail, because either can be wrong.
    """
    digests_of: dict[str, dict[str, str]] = {}  # by file: the checksums by host
    for host, model in facts.items():
        for name, digest in model.found.items():
            digests_of.setdefault(name, {})[host] = digest
    for name, digests in sorted(digests_of.items()):
        if len(set(digests.values())) > 1:
            most_frequent = Counter(digests.values()).most_common(1)[0][0]
            for host, digest in digests.items():
                if digest != most_frequent or len(digests) == 2:
                    others = ", ".join(other for other in digests if other != host)
                    yield Check("model", FAILURE, f"{name} is not the same as on {others}: fetch it again", host)


def check_addresses(host: Host, facts: HostFacts) -> Iterator[Check]:
    """Check that a host has the addresses that the hostfile gives it."""
    ips = [address.partition(":")[0] for address in host.ips]
    missing = [ip for ip in ips if ip not in facts.interfaces]
    if missing:
        present = [f"{ip} on {name}" for ip, name in sorted(facts.interfaces.items()) if not ip.startswith("127.")]
        message = (
            f"{', '.join(missing)} is on none of its interfaces that are up ({', '.join(present) or 'it has none'}): "
            "correct the hostfile, or let `mlx.distributed_config --over thunderbolt --auto-setup` set the addresses, "
            "which a restart undoes"
        )
        yield Check("addresses", FAILURE, message)
    elif ips:
        listed = ", ".join(f"{ip} on {facts.interfaces[ip]}" for ip in ips)
        yield Check("addresses", OK, listed)


def check_backend(host: Host, backend: Backend, hello: Hello, facts: HostFacts) -> Check:
    """Check that a host can use the hostfile's backend."""
    name = "ring" if backend is Backend.RING else "jaccl"
    if name not in facts.backends:
        fix = 'write "backend": "ring" in the hostfile'
        if (macos := macos_version(hello.system)) is not None and macos < RDMA_MACOS:
            fix = f"update {hello.system} to macOS 26.2 or newer, or {fix}"
        return Check("backend", FAILURE, f"its mlx has no {name}: {fix}")
    return Check("backend", OK, "ring can be used") if backend is Backend.RING else _check_rdma(host, hello, facts)


def _check_rdma(host: Host, hello: Hello, facts: HostFacts) -> Check:
    """Check that a host can use jaccl: RDMA on, the hostfile's devices, no Thunderbolt bridge, and a newer macOS."""
    devices = rdma_devices(facts.settings.get("ibv_devices", ""))
    needed = [device for cell in host.rdma for device in ([cell] if isinstance(cell, str) else cell or ())]
    if not rdma_is_enabled(facts.settings.get("rdma_ctl", "")):
        message = "RDMA is off: start this Mac in Recovery and run `rdma_ctl enable` in its Terminal (not over ssh)"
        return Check("backend", FAILURE, message)
    if missing := [device for device in needed if device not in devices]:
        message = (
            f"{', '.join(missing)} is not among its RDMA devices ({', '.join(devices) or 'it has none'}): names change "
            "with a restart or a replugged cable, so let `mlx.distributed_config` write the hostfile again; "
            "Thunderbolt 4 has none"
        )
        return Check("backend", FAILURE, message)
    if bridge_is_active(facts.settings.get("bridge0", "")):
        fix = "`sudo networksetup -setnetworkserviceenabled 'Thunderbolt Bridge' off` there"
        return Check("backend", FAILURE, f"the Thunderbolt bridge holds the cables: {fix}")
    if (macos := macos_version(hello.system)) is not None and macos < LARGE_RDMA_MACOS:
        return Check("backend", WARNING, f"{hello.system} sends 4 kB at a time: update to macOS 26.3")
    return Check("backend", OK, f"jaccl over {', '.join(needed)}")


def check_environment(facts: HostFacts, envs: Sequence[str]) -> Check:
    """Check that MLX_METAL_FAST_SYNCH, which can hang a GPU, is unset on the host and in the hostfile's ``envs``."""
    if any(line.startswith(f"{_FAST_SYNCH}=") for line in envs):
        message = f"the hostfile sets {_FAST_SYNCH}, which can wedge a GPU until it is restarted: take it out of envs"
        return Check("environment", WARNING, message)
    if _FAST_SYNCH in facts.environment:
        message = f"{_FAST_SYNCH} is set there, which can wedge a GPU until it is restarted: `unset {_FAST_SYNCH}`"
        return Check("environment", WARNING, f"{message} in its shell's start-up file")
    return Check("environment", OK, f"{_FAST_SYNCH} is not set")


def check_sleep(facts: HostFacts) -> Iterator[Check]:
    """Check that a host does not sleep; yield nothing if its system reports no sleep setting."""
    minutes = sleeps_after_minutes(facts.settings.get("pmset", ""))
    if minutes is None:
        return
    if minutes:
        message = f"it sleeps after {minutes} idle minutes (mlx-k2 keeps it awake only while it runs)"
        yield Check("sleep", WARNING, f"{message}: `sudo pmset -a sleep 0 disksleep 0` there")
    else:
        yield Check("sleep", OK, "never")


def check_hop(speed: HopSpeed) -> Check:
    """Check that a hop is fast enough."""
    figures = f"{1e6 * speed.latency_s:.0f} us for a token, {speed.bytes_per_s / 1e9:.2f} GB/s"
    if speed.bytes_per_s < MIN_HOP_BYTES_PER_S or speed.latency_s > MAX_HOP_S:
        return Check("hop", WARNING, f"{figures}: slow; see that the hostfile's ips are those of the cable")
    return Check("hop", OK, figures)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
