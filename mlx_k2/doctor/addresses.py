"""The addresses over which the stages of several hosts can connect, and the speed of their hops. Changes nothing."""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from mlx_k2.cluster.host_facts import HopSpeed, HostFacts
from mlx_k2.cluster.hostfile import Host, Hostfile
from mlx_k2.deployment import bring_up
from mlx_k2.deployment.cluster_options import DeploymentRequest
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.errors import ClusterError, SetupError
from mlx_k2.launch.group import StageGroup
from mlx_k2.protocol.messages import Hello, HopsMeasured, MeasureHops, Probe
from mlx_k2.weights.model_source import BUILTIN, ModelSource

ANSWER_S = 60.0  # seconds without an answer of any stage


def address_choices(interfaces: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """Return choices of one address for each host. ``interfaces`` has each host's interface names by IPv4 address.

    In a choice all hosts are in one network; link-local networks are last. If no network has all hosts, there is at
    most one choice: each host's address is in a network of the host before it (the first host's in a network of the
    last), as with cables between neighbours. Networks are assumed to have 256 addresses, link-local ones 65536.
    """
    address_in = [
        {_network(ip): ip for ip in sorted(host) if not ipaddress.ip_address(ip).is_loopback} for host in interfaces
    ]
    common = set.intersection(*(set(networks) for networks in address_in))
    if common:
        ordered = sorted(common, key=lambda network: (network.startswith("169.254."), network))
        return [tuple(networks[network] for networks in address_in) for network in ordered]
    choice = []
    for networks, previous in zip(address_in, [address_in[-1], *address_in[:-1]], strict=True):
        shared = sorted(networks.keys() & previous.keys())
        if not shared:
            return []
        choice.append(networks[shared[0]])
    return [tuple(choice)]


def host_interfaces(request: DeploymentRequest) -> list[dict[str, str]]:
    """Start a stage on each host, and return the names of each host's interfaces by IPv4 address.

    Raises:
        ClusterError: a host does not answer.
    """
    with bring_up.stage_group(request, DeploymentListener()) as group:
        bring_up.collect(group, Hello, range(group.size), bring_up.HANDSHAKE_S, "start")
        messages = [Probe(ModelSource(path_or_repo=BUILTIN), layers=None, deep=False)] * group.size
        return [facts.interfaces for facts in bring_up.ask(group, messages, HostFacts, ANSWER_S, "report")]


def fastest_choice(
    request: DeploymentRequest, choices: Sequence[tuple[str, ...]]
) -> tuple[tuple[str, ...], float | None]:
    """Return the choice of addresses whose slowest hop is the fastest, and that hop's bytes per second.

    Choices over which the stages cannot connect are left out. A single choice is not measured; its speed is None.

    Raises:
        SetupError: there is no choice, or the stages connect over none of them.
    """
    if len(choices) == 1:
        return choices[0], None
    measured = []
    problem = "the hosts share no network: give an address of each with --address"
    for choice in choices:
        try:
            with bring_up.stage_group(request, DeploymentListener()) as group:
                bring_up.collect(group, Hello, range(group.size), bring_up.HANDSHAKE_S, "start")
                speeds = measured_hops(group, with_addresses(request, choice).hostfile)
        except (ClusterError, SetupError) as error:
            problem = str(error)
        else:
            measured.append((min(speed.bytes_per_s for speed in speeds), choice))
    if not measured:
        raise SetupError(problem)
    bytes_per_s, choice = max(measured)
    return choice, bytes_per_s


def with_addresses(request: DeploymentRequest, addresses: Sequence[str]) -> DeploymentRequest:
    """Return the request with one address for each host."""
    hosts: list[Host] = [
        msgspec.structs.replace(host, ips=(address,))
        for host, address in zip(request.hostfile.hosts, addresses, strict=True)
    ]
    hostfile: Hostfile = msgspec.structs.replace(request.hostfile, hosts=tuple(hosts))
    return replace(request, hostfile=hostfile)


def measured_hops(group: StageGroup, hostfile: Hostfile) -> list[HopSpeed]:
    """Connect started stages as a run does, with the built-in model, which each host has. Return each hop's speed."""
    prepared = bring_up.prepare(group, hostfile, [ModelSource(path_or_repo=BUILTIN)] * group.size)
    bring_up.connect(group, bring_up.links(hostfile, prepared))
    answers = bring_up.ask(group, [MeasureHops()] * group.size, HopsMeasured, ANSWER_S, "measure its hops")
    return [answer.to_next for answer in answers if answer.to_next is not None]


def _network(ip: str) -> str:
    bits = 16 if ip.startswith("169.254.") else 24
    return str(ipaddress.ip_network(f"{ip}/{bits}", strict=False))
