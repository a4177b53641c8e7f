"""Checks of the facts that hosts report: each result is ok, a warning or a failure, with the fix. Pure."""

import enum
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

SLOW_ANSWER_S = 0.02
"""Limit of the control connection's round trip, through which a step plan goes for every token."""
CLOCK_SKEW_S = 5.0
SLOW_HOP_S = 0.005
SLOW_HOP_BYTES_PER_S = 100e6
"""Gigabit Ethernet: a prompt's chunk of 29 MB then takes 0.3 s per hop."""
RDMA_MACOS = (26, 2)
LARGE_RDMA_MACOS = (26, 3)
_FAST_SYNCH = "MLX_METAL_FAST_SYNCH"


class CheckResult(enum.Enum):
    """The result of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True)
class Check:
    """One check of one host. ``found`` includes the fix, with commands between backticks."""

    host: str
    what: str
    result: CheckResult
    found: str

    @property
    def commands(self) -> list[str]:
        """The commands to run; none if the result is OK."""
        return re.findall(r"`([^`]+)`", self.found) if self.result is not CheckResult.OK else []


@dataclass(frozen=True)
class HostAnswer:
    """A host's round trip over its control connection, and how far its clock is ahead of this machine's."""

    round_trip_s: float
    clock_ahead_s: float


def check_answer(host: str, answer: HostAnswer) -> Iterator[Check]:
    """Check that a host answers fast enough for one step plan per token, and that its clock is right."""
    trip = f"answers in {1000 * answer.round_trip_s:.1f} ms"
    if answer.round_trip_s > SLOW_ANSWER_S:
        yield Check(host, "ssh", CheckResult.WARNING, f"{trip}: each token waits for that; use a cable, not Wi-Fi")
    else:
        yield Check(host, "ssh", CheckResult.OK, trip)
    ahead_s = answer.clock_ahead_s
    if abs(ahead_s) > CLOCK_SKEW_S:
        set_clock = "set it: `sudo sntp -sS time.apple.com` there; logs will not match, nothing else depends on it"
        way = "ahead of" if ahead_s > 0 else "behind"
        yield Check(host, "clock", CheckResult.WARNING, f"{abs(ahead_s):.0f} s {way} this machine's: {set_clock}")
    else:
        yield Check(host, "clock", CheckResult.OK, f"within {CLOCK_SKEW_S:g} s of this machine's")


def check_versions(
    host: Host, hello: Hello, here: Mapping[str, str], backend: Backend, systems: set[str]
) -> Iterator[Check]:
    """Check that a host's package versions are those of this machine (``here``), and all ``systems`` equal."""
    there = {"mlx-k2": hello.mlx_k2_version, "mlx": hello.mlx_version}
    wrong = [name for name in here if there[name] != here[name]]
    listed = ", ".join(f"{name} {there[name]}" for name in there)
    if wrong:
        ssh = None if host.is_local else host.ssh
        install = install_versions(ssh, host.python, {name: here[name] for name in wrong})
        found = f"{listed}: install what this machine has: {install}"
        yield Check(host.ssh, "versions", CheckResult.FAILURE, found)
    else:
        yield Check(host.ssh, "versions", CheckResult.OK, f"{listed}, Python {hello.python_version}")
    rdma = backend is not Backend.RING
    if len(systems) > 1:
        result = CheckResult.FAILURE if rdma else CheckResult.WARNING
        yield Check(host.ssh, "system", result, f"{hello.system}, and other hosts run another: update all to the same")
    else:
        yield Check(host.ssh, "system", CheckResult.OK, hello.system)


def check_memory(host: str, hello: Hello, free_bytes: int, needed_bytes: int | None) -> Iterator[Check]:
    """Check that a host can hold its stage. ``needed_bytes`` None: the need is not known."""
    limit_bytes = hello.working_set_bytes
    bound = limit_bytes if limit_bytes is not None else hello.memory_bytes
    kind = "GPU memory" if limit_bytes is not None else "memory"
    if needed_bytes is None:
        yield Check(host, "memory", CheckResult.OK, f"{_gb(bound)} of {kind}, {_gb(free_bytes)} not in use")
    elif needed_bytes > bound:
        raise_it = "give --split, a smaller --context or another host"
        if limit_bytes is not None and needed_bytes < hello.memory_bytes:
            raise_it = f"run `sudo sysctl iogpu.wired_limit_mb={-(-needed_bytes // 2**20)}` there, or {raise_it}"
        found = f"its stage needs {_gb(needed_bytes)} and {_gb(bound)} of {kind} may be held: {raise_it}"
        yield Check(host, "memory", CheckResult.FAILURE, found)
    elif needed_bytes > free_bytes:
        found = f"its stage needs {_gb(needed_bytes)} and {_gb(free_bytes)} are not in use: end other programs there"
        yield Check(host, "memory", CheckResult.WARNING, found)
    else:
        yield Check(host, "memory", CheckResult.OK, f"its stage needs {_gb(needed_bytes)} of {_gb(bound)} of {kind}")


def check_model(host: str, facts: ModelFacts, download: str) -> Iterator[Check]:
    """Check that a stage's files are present and correct. ``download`` is the command that fetches them, '' without."""
    if facts.problem is not None:
        yield Check(host, "model", CheckResult.FAILURE, facts.problem)
        return
    if facts.missing_bytes:
        found = f"{_gb(facts.missing_bytes)} of {facts.num_files} files are still to be fetched"
        if facts.missing_bytes > facts.disk_free_bytes:
            found += f", and its disk has {_gb(facts.disk_free_bytes)} free: free some, then"
            yield Check(host, "model", CheckResult.FAILURE, f"{found} run `{download}`")
        else:
            yield Check(host, "model", CheckResult.WARNING, f"{found}: run `{download}`")
        return
    differing = sorted(name for name, digest in facts.expected.items() if facts.found.get(name, digest) != digest)
    if differing:
        found = f"{', '.join(differing)} in {facts.folder} is not what the Hub has: remove it and "
        found += f"run `{download}`" if download else "copy it again"
        yield Check(host, "model", CheckResult.FAILURE, found)
        return
    right = sum(name in facts.found for name in facts.expected)
    if facts.found:
        compared = f"{right} of them right by their checksums" if right else "not compared: none was known before"
    else:
        compared = f"{len(facts.expected)} of them with known checksums" if facts.expected else "not compared"
    yield Check(host, "model", CheckResult.OK, f"{facts.num_files} files in {facts.folder}, {compared}")


def check_copies(facts: Mapping[str, ModelFacts]) -> Iterator[Check]:
    """Check that hosts that hold the same file hold the same bytes. ``facts`` is by host, with checksums."""
    by_name: dict[str, dict[str, str]] = {}
    for host, model in facts.items():
        for name, digest in model.found.items():
            by_name.setdefault(name, {})[host] = digest
    for name, digests in sorted(by_name.items()):
        if len(set(digests.values())) > 1:
            usual = Counter(digests.values()).most_common(1)[0][0]
            for host, digest in digests.items():
                if digest != usual or len(digests) == 2:
                    others = ", ".join(other for other in digests if other != host)
                    yield Check(
                        host, "model", CheckResult.FAILURE, f"{name} is not the same as on {others}: fetch it again"
                    )


def check_addresses(host: Host, facts: HostFacts) -> Iterator[Check]:
    """Check that a host has the addresses that the hostfile gives it."""
    ips = [address.partition(":")[0] for address in host.ips]
    missing = [ip for ip in ips if ip not in facts.interfaces]
    if missing:
        has = ", ".join(f"{ip} on {name}" for ip, name in sorted(facts.interfaces.items()) if not ip.startswith("127."))
        found = (
            f"{', '.join(missing)} is on none of its interfaces that are up ({has or 'it has none'}): correct the "
            "hostfile, or let `mlx.distributed_config --over thunderbolt --auto-setup` set the addresses, which a "
            "restart undoes"
        )
        yield Check(host.ssh, "addresses", CheckResult.FAILURE, found)
    elif ips:
        listed = ", ".join(f"{ip} on {facts.interfaces[ip]}" for ip in ips)
        yield Check(host.ssh, "addresses", CheckResult.OK, listed)


def check_backend(host: Host, backend: Backend, hello: Hello, facts: HostFacts) -> Iterator[Check]:
    """Check that a host can use the hostfile's backend."""
    name = "ring" if backend is Backend.RING else "jaccl"
    if backend is Backend.RING or name not in facts.backends:
        if name in facts.backends:
            yield Check(host.ssh, "backend", CheckResult.OK, f"{name} can be used")
            return
        way_out = 'write "backend": "ring" in the hostfile'
        if (macos := macos_version(hello.system)) is not None and macos < RDMA_MACOS:
            way_out = f"update {hello.system} to macOS 26.2 or newer, or {way_out}"
        yield Check(host.ssh, "backend", CheckResult.FAILURE, f"its mlx has no {name}: {way_out}")
        return
    yield from _check_rdma(host, hello, facts)


def _check_rdma(host: Host, hello: Hello, facts: HostFacts) -> Iterator[Check]:
    devices = rdma_devices(facts.settings.get("ibv_devices", ""))
    wanted = [device for cell in host.rdma for device in ([cell] if isinstance(cell, str) else cell or ())]
    if not rdma_is_enabled(facts.settings.get("rdma_ctl", "")):
        found = "RDMA is off: start this Mac in Recovery and run `rdma_ctl enable` in its Terminal (not over ssh)"
        yield Check(host.ssh, "backend", CheckResult.FAILURE, found)
    elif missing := [device for device in wanted if device not in devices]:
        found = (
            f"{', '.join(missing)} is not among its RDMA devices ({', '.join(devices) or 'it has none'}): names change "
            "with a restart or a replugged cable, so let `mlx.distributed_config` write the hostfile again; "
            "Thunderbolt 4 has none"
        )
        yield Check(host.ssh, "backend", CheckResult.FAILURE, found)
    elif bridge_is_active(facts.settings.get("bridge0", "")):
        turn_off = "`sudo networksetup -setnetworkserviceenabled 'Thunderbolt Bridge' off` there"
        found = f"the Thunderbolt bridge holds the cables: {turn_off}"
        yield Check(host.ssh, "backend", CheckResult.FAILURE, found)
    elif (macos := macos_version(hello.system)) is not None and macos < LARGE_RDMA_MACOS:
        yield Check(
            host.ssh, "backend", CheckResult.WARNING, f"{hello.system} sends 4 kB at a time: update to macOS 26.3"
        )
    else:
        yield Check(host.ssh, "backend", CheckResult.OK, f"jaccl over {', '.join(wanted)}")


def check_environment(host: str, facts: HostFacts, envs: Sequence[str]) -> Iterator[Check]:
    """Check that MLX_METAL_FAST_SYNCH, which can hang a GPU, is unset on the host and in the hostfile's ``envs``."""
    given = [line for line in envs if line.startswith(f"{_FAST_SYNCH}=")]
    if given:
        found = f"the hostfile sets {_FAST_SYNCH}, which can wedge a GPU until it is restarted: take it out of envs"
        yield Check(host, "environment", CheckResult.WARNING, found)
    elif _FAST_SYNCH in facts.environment:
        found = f"{_FAST_SYNCH} is set there, which can wedge a GPU until it is restarted: `unset {_FAST_SYNCH}`"
        yield Check(host, "environment", CheckResult.WARNING, f"{found} in its shell's start-up file")
    else:
        yield Check(host, "environment", CheckResult.OK, f"{_FAST_SYNCH} is not set")


def check_sleep(host: str, facts: HostFacts) -> Iterator[Check]:
    """Check that a host does not sleep; yield nothing if its system reports no sleep setting."""
    minutes = sleeps_after_minutes(facts.settings.get("pmset", ""))
    if minutes is None:
        return
    if minutes:
        found = f"it sleeps after {minutes} idle minutes (mlx-k2 keeps it awake only while it runs)"
        yield Check(host, "sleep", CheckResult.WARNING, f"{found}: `sudo pmset -a sleep 0 disksleep 0` there")
    else:
        yield Check(host, "sleep", CheckResult.OK, "never")


def check_hop(hosts: Sequence[Host], rank: int, speed: HopSpeed) -> Check:
    """Check that the hop from stage ``rank`` to the next one is fast enough."""
    name = f"{hosts[rank].ssh} to {hosts[rank + 1].ssh}"
    found = f"{1e6 * speed.latency_s:.0f} us for a token, {speed.bytes_per_s / 1e9:.2f} GB/s"
    if speed.bytes_per_s < SLOW_HOP_BYTES_PER_S or speed.latency_s > SLOW_HOP_S:
        return Check(
            name, "hop", CheckResult.WARNING, f"{found}: slow; see that the hostfile's ips are those of the cable"
        )
    return Check(name, "hop", CheckResult.OK, found)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
