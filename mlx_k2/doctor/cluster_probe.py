"""The probe of a cluster before anything is loaded: every host, also if others fail, then every hop. Prints nothing."""

import statistics
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TypeVar

from mlx_k2 import __version__
from mlx_k2.cluster.host_facts import HostFacts
from mlx_k2.deployment import bring_up
from mlx_k2.deployment.cluster_options import DeploymentRequest, source_on
from mlx_k2.deployment.dry_run import plan_for
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.deployment.plan import HostMemory, StagePlan
from mlx_k2.doctor.addresses import measured_hops
from mlx_k2.doctor.checks import (
    FAILURE,
    WARNING,
    Check,
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
    ReadClock,
)
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.model_source import is_repo

ALL_HOSTS = "all hosts"
NUM_CLOCK_READINGS = 7
PROBE_S = 90.0  # seconds without a message of any stage
DEEP_PROBE_S = 900.0  # the same with --deep, where a stage computes the checksum of a file between two messages

Wanted = TypeVar("Wanted", bound=FromStage)


def probe_cluster(
    request: DeploymentRequest, model: ModelDescription | None, listener: DeploymentListener, *, deep: bool
) -> tuple[Check, ...]:
    """Return all checks of every host and hop. A host that fails one check is still probed for the others.

    ``model`` None: the stages' memory needs and files are not checked. ``deep`` computes the files' checksums.
    """
    hosts = request.hostfile.hosts
    with bring_up.stage_group(request, listener) as group:
        probe = _ClusterProbe(request, group, listener)
        listener.phase("asking the hosts")
        hellos = probe.collect(Hello, range(len(hosts)), bring_up.HANDSHAKE_S, "ssh")
        plans = probe.plan(model, hellos)
        for rank in hellos:
            probe.check_clock(rank)
        listener.phase("computing checksums" if deep else "probing the hosts")
        facts_by_rank = probe.collect_facts(hellos, plans, deep=deep)
        for rank, facts in facts_by_rank.items():
            probe.check_facts(rank, hellos, facts, plans)
        models = {probe.name(rank): facts.model for rank, facts in facts_by_rank.items() if facts.model is not None}
        probe.checks += check_copies(models)
        if 1 < len(facts_by_rank) == len(hosts):
            listener.phase("measuring the hops")
            probe.check_hops()
        elif len(hosts) > 1:
            probe.checks.append(Check("hop", WARNING, "not measured: not every host answered", ALL_HOSTS))
    return tuple(probe.checks)


class _ClusterProbe:
    """The checks so far, and the stages that answer for their hosts. ``_ended`` has the reason of each end by rank."""

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

    def collect(
        self, wanted: type[Wanted], ranks: Collection[int], silence_s: float, check_name: str
    ) -> dict[int, Wanted]:
        """Return the ``wanted`` messages by rank; add a failed check for each of ``ranks`` that sends none.

        Wait until all have sent one or ended, or no stage has sent anything for ``silence_s``.
        """
        answers: dict[int, Wanted] = {}
        pending = set(ranks)
        while pending:
            for rank in sorted(pending & self._ended.keys()):
                self._fail(rank, check_name, self._ended[rank])
                pending.discard(rank)
            if not pending:
                break
            event = self._group.receive(silence_s)
            if event is None:
                for rank in sorted(pending):
                    message = f"no answer for {silence_s:.0f} s: see that it is awake and on this network"
                    self._fail(rank, check_name, message)
                return answers
            if isinstance(event, StageEnded):
                self._ended.setdefault(event.rank, event.reason)  # a Fault of the stage is the better reason
            elif isinstance(event, Woken):
                continue
            elif isinstance(event.message, Fault):
                self._ended[event.rank] = event.message.message
            elif isinstance(event.message, wanted):
                answers[event.rank] = event.message
                pending.discard(event.rank)
            elif isinstance(event.message, DownloadProgress):
                self._listener.progress(event.rank, event.message)
        return answers

    def plan(self, model: ModelDescription | None, hellos: Mapping[int, Hello]) -> Sequence[StagePlan]:
        """Return the stage plans for the memory of the hosts that answered; none without ``model``, or if none fits."""
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
            self.checks.append(Check("memory", FAILURE, str(error), ALL_HOSTS))
            return ()
        self._listener.planned(model, plans)
        return plans

    def check_clock(self, rank: int) -> None:
        """Check a host's round trip (the median of some readings) and clock (of the fastest, most exact reading)."""
        readings = []
        for _ in range(NUM_CLOCK_READINGS):
            sent_at, sent_unix_s = time.monotonic(), time.time()
            self._group.send(rank, ReadClock())
            if (answer := self.collect(ClockRead, [rank], PROBE_S, "ssh").get(rank)) is None:
                return
            round_trip_s = time.monotonic() - sent_at
            readings.append((round_trip_s, answer.unix_s - sent_unix_s - round_trip_s / 2))
        _, clock_ahead_s = min(readings)
        median_s = statistics.median(round_trip_s for round_trip_s, _ in readings)
        self._add(rank, check_answer(median_s, clock_ahead_s))

    def collect_facts(
        self, hellos: Mapping[int, Hello], plans: Sequence[StagePlan], *, deep: bool
    ) -> dict[int, HostFacts]:
        """Return the facts of the hosts that answer, by rank."""
        for rank in hellos:
            layers = (plans[rank].assignment.first_layer, plans[rank].assignment.end_layer) if plans else None
            self._group.send(rank, Probe(source_on(self._hosts[rank], self._request.source), layers, deep))
        return self.collect(HostFacts, list(hellos), DEEP_PROBE_S if deep else PROBE_S, "probe")

    def check_facts(self, rank: int, hellos: Mapping[int, Hello], facts: HostFacts, plans: Sequence[StagePlan]) -> None:
        """Add all checks of one host's facts."""
        host, hello, hostfile = self._hosts[rank], hellos[rank], self._request.hostfile
        here = {"mlx-k2": __version__, "mlx": version("mlx")}
        systems = {hello.system for hello in hellos.values()}
        needed_bytes = plans[rank].needed_bytes if plans else None
        checks = [*check_versions(host, hello, here, hostfile.backend, systems)]
        checks.append(check_memory(hello, facts.memory_free_bytes, needed_bytes))
        if facts.model is not None:
            checks.append(check_model(facts.model, self._download()))
        if len(self._hosts) > 1:
            checks += [*check_addresses(host, facts), check_backend(host, hostfile.backend, hello, facts)]
        self._add(rank, [*checks, check_environment(facts, hostfile.envs), *check_sleep(facts)])

    def check_hops(self) -> None:
        """Measure and check each hop."""
        if any(check.result is FAILURE and check.name in ("addresses", "backend") for check in self.checks):
            self._fail_hops("not tried: see the failures above")
            return
        try:
            speeds = measured_hops(self._group, self._request.hostfile)
        except (ClusterError, SetupError) as error:
            self._fail_hops(f"{error}: check the cable and the addresses")
            return
        self.checks += [
            replace(check_hop(speed), host=f"{self.name(rank)} to {self.name(rank + 1)}")
            for rank, speed in enumerate(speeds)
        ]

    def _download(self) -> str:
        """Return the command that fetches the files of a repository; '' for a folder."""
        return self._request.command_line("download") if is_repo(self._request.source) else ""

    def _fail(self, rank: int, check_name: str, message: str) -> None:
        self.checks.append(Check(check_name, FAILURE, message, self.name(rank)))

    def _fail_hops(self, message: str) -> None:
        self.checks.append(Check("hop", FAILURE, message, ALL_HOSTS))
