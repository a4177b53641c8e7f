"""The probe of a cluster before anything is loaded: every host, even if others fail, then every hop. Prints nothing."""

import statistics
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TypeVar

from mlx_k2 import __version__
from mlx_k2.cluster.host_facts import HostFacts
from mlx_k2.deployment import bring_up
from mlx_k2.deployment.cluster_options import DeploymentRequest, source_on, stage_location
from mlx_k2.deployment.dry_run import plan_for
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.deployment.plan import HostMemory, StagePlan
from mlx_k2.doctor.addresses import measured_hops
from mlx_k2.doctor.checks import (
    Check,
    CheckResult,
    HostAnswer,
    check_addresses,
    check_answer,
    check_backend,
    check_copies,
    check_environment,
    check_hop,
    check_memory,
    check_model,
    check_sleep,
    check_versions,
)
from mlx_k2.errors import ClusterError, PartitionError, SetupError
from mlx_k2.launch.group import StageGroup
from mlx_k2.launch.stage_events import StageEnded, Woken
from mlx_k2.protocol.messages import (
    ClockRead,
    DownloadProgress,
    Fault,
    FromStage,
    Hello,
    Probe,
    ProbeResult,
    ReadClock,
)
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.model_source import is_repo

NUM_CLOCK_READINGS = 7
PROBE_S = 90.0
DEEP_S = 900.0
"""Time limit without a message, in which the checksum of one file is computed."""

Wanted = TypeVar("Wanted", bound=FromStage)


def probe_cluster(
    request: DeploymentRequest, model: ModelDescription | None, listener: DeploymentListener, *, deep: bool
) -> tuple[Check, ...]:
    """Run every check of every host and hop. A host that fails one check is still asked for the others.

    ``model`` None: the stages' memory needs and files are not checked. ``deep`` computes the files' checksums.
    """
    hosts = request.hostfile.hosts
    locations = [stage_location(host) for host in hosts]
    with StageGroup(
        locations,
        request.options.lease_s,
        listener.log,
        listener.notify,
        request.options.stall_timeout_s,
        environment=request.hostfile.envs,
    ) as group:
        round_ = _Round(request, group, listener)
        listener.phase("asking the hosts")
        hellos = round_.collect(Hello, range(len(hosts)), bring_up.HANDSHAKE_S, "ssh")
        plans = round_.plan(model, hellos)
        for rank in list(hellos):
            round_.ask_clock(rank)
        listener.phase("computing checksums" if deep else "probing the hosts")
        facts = round_.probe(hellos, plans, deep=deep)
        for rank in facts:
            round_.judge(rank, hellos, facts[rank], plans)
        models = {round_.name(rank): one.model for rank, one in facts.items() if one.model is not None}
        round_.checks += check_copies(models)
        if 1 < len(facts) == len(hosts):
            listener.phase("measuring the hops")
            round_.measure_hops()
        elif len(hosts) > 1:
            round_.checks.append(
                Check("all hosts", "hop", CheckResult.WARNING, "not measured: not every host answered")
            )
    return tuple(round_.checks)


class _Round:
    """The checks so far, and the stages that answer them."""

    def __init__(self, request: DeploymentRequest, group: StageGroup, listener: DeploymentListener) -> None:
        self._request = request
        self._hosts = request.hostfile.hosts
        self._group = group
        self._listener = listener
        self._ended: dict[int, str] = {}
        self.checks: list[Check] = []

    def name(self, rank: int) -> str:
        """Return the name of a host for its checks, with the stage if several stages run there."""
        ssh = self._hosts[rank].ssh
        name = "this machine" if self._hosts[rank].is_local else ssh
        return f"{name}, stage {rank}" if [host.ssh for host in self._hosts].count(ssh) > 1 else name

    def _add(self, rank: int, checks: Iterable[Check]) -> None:
        self.checks += [replace(check, host=self.name(rank)) for check in checks]

    def collect(self, wanted: type[Wanted], ranks: Collection[int], silence_s: float, what: str) -> dict[int, Wanted]:
        """Return the answers by rank; add a failed check ``what`` for each of ``ranks`` that does not answer."""
        answers: dict[int, Wanted] = {}
        owing = set(ranks)
        while owing:
            for rank in sorted(owing & self._ended.keys()):
                self._fail(rank, what, self._ended[rank])
                owing.discard(rank)
            if not owing:
                break
            event = self._group.receive(silence_s)
            if event is None:
                for rank in sorted(owing):
                    self._fail(rank, what, f"no answer for {silence_s:.0f} s: see that it is awake and on this network")
                return answers
            if isinstance(event, StageEnded):
                self._ended.setdefault(event.rank, event.reason)
            elif isinstance(event, Woken):
                continue
            elif isinstance(event.message, Fault):
                self._ended[event.rank] = event.message.message
            elif isinstance(event.message, wanted):
                answers[event.rank] = event.message
                owing.discard(event.rank)
            elif isinstance(event.message, DownloadProgress):
                self._listener.progress(event.rank, event.message)
        return answers

    def plan(self, model: ModelDescription | None, hellos: Mapping[int, Hello]) -> Sequence[StagePlan]:
        """Return the stage plans for the memory of the hosts that answered; empty if no partition fits."""
        if model is None:
            return ()
        unknown = HostMemory(None, None)
        memories = [
            HostMemory(hello.working_set_bytes, hello.memory_bytes) if (hello := hellos.get(rank)) else unknown
            for rank in range(len(self._hosts))
        ]
        gpus = [hello.working_set_bytes is not None for hello in hellos.values()]
        try:
            _, plans = plan_for(self._request, model, memories, all_on_gpu=all(gpus))
        except PartitionError as error:
            self.checks.append(Check("all hosts", "memory", CheckResult.FAILURE, str(error)))
            return ()
        self._listener.planned(model, plans)
        return plans

    def ask_clock(self, rank: int) -> None:
        """Check a host's round trip (median of a few readings) and clock (of the quickest reading, the most exact)."""
        answers = []
        for _ in range(NUM_CLOCK_READINGS):
            asked, asked_at = time.monotonic(), time.time()
            self._group.send(rank, ReadClock())
            if (read := self.collect(ClockRead, [rank], PROBE_S, "ssh").get(rank)) is None:
                return
            elapsed_s = time.monotonic() - asked
            answers.append(HostAnswer(elapsed_s, read.unix_s - asked_at - elapsed_s / 2))
        quickest = min(answers, key=lambda answer: answer.round_trip_s)
        typical_s = statistics.median(answer.round_trip_s for answer in answers)
        self._add(rank, check_answer(self._hosts[rank].ssh, HostAnswer(typical_s, quickest.clock_ahead_s)))

    def probe(self, hellos: Mapping[int, Hello], plans: Sequence[StagePlan], *, deep: bool) -> dict[int, HostFacts]:
        """Return the facts of the hosts that answered, by rank."""
        for rank in hellos:
            assignment = plans[rank].assignment if plans else None
            layers = None if assignment is None else (assignment.first_layer, assignment.end_layer)
            self._group.send(rank, Probe(source_on(self._hosts[rank], self._request.source), layers, deep))
        answers = self.collect(ProbeResult, list(hellos), DEEP_S if deep else PROBE_S, "probe")
        return {rank: answer.facts for rank, answer in answers.items()}

    def judge(self, rank: int, hellos: Mapping[int, Hello], facts: HostFacts, plans: Sequence[StagePlan]) -> None:
        """Add all checks of one host's facts."""
        host, hello, hostfile = self._hosts[rank], hellos[rank], self._request.hostfile
        here = {"mlx-k2": __version__, "mlx": version("mlx")}
        systems = {each.system for each in hellos.values()}
        self._add(rank, check_versions(host, hello, here, hostfile.backend, systems))
        needed_bytes = plans[rank].needed_bytes if plans else None
        self._add(rank, check_memory(host.ssh, hello, facts.memory_free_bytes, needed_bytes))
        if facts.model is not None:
            self._add(rank, check_model(host.ssh, facts.model, self._download()))
        if len(self._hosts) > 1:
            self._add(rank, check_addresses(host, facts))
            self._add(rank, check_backend(host, hostfile.backend, hello, facts))
        self._add(rank, check_environment(host.ssh, facts, hostfile.envs))
        self._add(rank, check_sleep(host.ssh, facts))

    def measure_hops(self) -> None:
        """Connect all stages as a run does, with the built-in model, which every host has, and time each hop."""
        if any(check.result is CheckResult.FAILURE and check.what in ("addresses", "backend") for check in self.checks):
            self._fail_hops("not tried: see the failures above")
            return
        try:
            speeds = measured_hops(self._group, self._request.hostfile)
        except (ClusterError, SetupError) as error:
            self._fail_hops(f"{error}: check the cable and the addresses")
            return
        self.checks += [
            replace(check_hop(self._hosts, rank, speed), host=f"{self.name(rank)} to {self.name(rank + 1)}")
            for rank, speed in enumerate(speeds)
        ]

    def _download(self) -> str:
        """Return the command that fetches the files of a repository; '' for a folder."""
        return self._request.command_line("download") if is_repo(self._request.source) else ""

    def _fail(self, rank: int, what: str, found: str) -> None:
        self.checks.append(Check(self.name(rank), what, CheckResult.FAILURE, found))

    def _fail_hops(self, found: str) -> None:
        self.checks.append(Check("all hosts", "hop", CheckResult.FAILURE, found))
