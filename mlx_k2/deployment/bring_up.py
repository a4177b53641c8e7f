"""Bring-up of started processes to ready stages: handshake, prepare, connect, load.

A phase fails when no stage has sent a message for its limit. Knows no layers: the caller passes the messages that
define what each stage loads.
"""

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from mlx_k2.cluster.hostfile import Backend, Hostfile
from mlx_k2.deployment.cluster_options import DeploymentRequest, stage_location
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.errors import ProtocolError, StageSilent, StageStartError
from mlx_k2.launch.group import StageGroup
from mlx_k2.launch.health_monitor import HealthMonitor
from mlx_k2.launch.ssh import install_versions
from mlx_k2.launch.stage_events import Woken
from mlx_k2.protocol.messages import (
    Connect,
    Connected,
    DownloadProgress,
    FromStage,
    Hello,
    JacclLinks,
    LayerLoaded,
    Prepare,
    Prepared,
    RingLinks,
    ToStage,
)
from mlx_k2.weights.model_source import DraftHead, ModelSource

# Limits of a phase: seconds without a message from any stage.
HANDSHAKE_S = 60.0
PREPARE_S = 60.0
CONNECT_S = 90.0
"""MLX's ring tries for 31 s to reach a neighbour."""
LAYER_S = 600.0  # for loading and downloading: a layer is 10 GB, and a disk may be slow

JACCL_PORT = 32323
"""Port of rank 0 to which the other ranks connect before RDMA is used. mlx.launch uses the same port."""

PACKAGES = ("mlx-k2", "mlx")
"""The packages that compute on a stage."""

Reply = TypeVar("Reply", bound=FromStage)


def stage_group(
    request: DeploymentRequest, listener: DeploymentListener, cancelled: threading.Event | None = None
) -> StageGroup:
    """Return the stages of a request, one on each host, which start when the group is entered."""
    options = request.options
    return StageGroup(
        [stage_location(host) for host in request.hostfile.hosts],
        options.lease_s,
        log=listener.log,
        notify=listener.notify,
        stall_timeout_s=options.stall_timeout_s,
        cancelled=cancelled,
        environment=request.hostfile.envs,
    )


def handshake(group: StageGroup, versions: Sequence[str]) -> tuple[Hello, ...]:
    """Wait for every stage's Hello. Every stage must have ``versions``, this machine's versions of PACKAGES.

    Raises:
        StageStartError: a stage did not start, or has another version.
        StageSilent: no message within HANDSHAKE_S.
    """
    hellos = collect(group, Hello, range(group.size), HANDSHAKE_S, "start")
    for rank, hello in enumerate(hellos):
        here = dict(zip(PACKAGES, versions, strict=True))
        there = dict(zip(PACKAGES, (hello.mlx_k2_version, hello.mlx_version), strict=True))
        differing = {package: here[package] for package in PACKAGES if here[package] != there[package]}
        if differing:
            location, package = group.location(rank), next(iter(differing))
            raise StageStartError(
                f"stage {rank} on {location.host} has {package} {there[package]}, this machine has {here[package]}: "
                f"install the same on both: {install_versions(location.ssh, location.python, differing)}"
            )
    return hellos


def prepare(
    group: StageGroup,
    hostfile: Hostfile,
    sources: Sequence[ModelSource],
    draft_heads: Sequence[DraftHead | None] | None = None,
) -> tuple[Prepared, ...]:
    """Make every stage reserve its ports and read its model's config and index; return the answers.

    ``sources`` has each host's own model source. ``draft_heads`` has for each stage the draft head if the stage reads
    some of its tensors, else None.

    Raises:
        StageStartError: two hosts have different models, or different draft heads.
        ProtocolError: a stage reports other addresses than those of its host.
    """
    needs_ports = hostfile.backend is Backend.RING and group.size > 1  # the other back ends use RDMA
    heads = draft_heads or [None] * group.size
    messages = [
        Prepare(rank, group.size, source, host.ips if needs_ports else (), head)
        for rank, (host, source, head) in enumerate(zip(hostfile.hosts, sources, heads, strict=True))
    ]
    prepared = ask(group, messages, Prepared, PREPARE_S, "prepare")
    rank_by_draft = {
        answer.draft_digest: rank for rank, answer in enumerate(prepared) if answer.draft_digest is not None
    }
    if len(rank_by_draft) > 1:
        left, right, *_ = rank_by_draft.values()
        raise StageStartError(
            f"the draft head on {group.host(left)} (stage {left}) is not the one on {group.host(right)} "
            f"(stage {right}): copy the same files to both"
        )
    for rank, answer in enumerate(prepared):
        if answer.model_digest != prepared[0].model_digest:
            raise StageStartError(
                f"the model on {group.host(rank)} (stage {rank}) is not the one on {group.host(0)} (stage 0): "
                "their config.json or model.safetensors.index.json differ; fetch the same revision on both"
            )
        if [_ip(address) for address in answer.addresses] != [_ip(address) for address in messages[rank].listen]:
            listed = ", ".join(answer.addresses) or "nowhere"
            raise ProtocolError(
                f"stage {rank} on {group.host(rank)} listens on {listed}, which is not in the hostfile", rank
            )
    return prepared


def links(hostfile: Hostfile, prepared: Sequence[Prepared]) -> RingLinks | JacclLinks | None:
    """Return the links between the stages, which listen on the addresses in ``prepared``; None for a single stage."""
    if len(hostfile.hosts) == 1:
        return None
    if hostfile.backend is Backend.RING:
        return RingLinks(tuple(answer.addresses for answer in prepared))
    ip, _, port = hostfile.hosts[0].ips[0].partition(":")
    return JacclLinks(
        devices=tuple(host.rdma for host in hostfile.hosts),
        coordinator=f"{ip}:{port or JACCL_PORT}",
        ring=hostfile.backend is Backend.JACCL_RING,
    )


def connect(group: StageGroup, links: RingLinks | JacclLinks | None) -> None:
    """Connect all stages to the data plane. Each hop is checked with 32 random bytes sent only to its two ends.

    Raises:
        StageStartError: a connection of a stage does not end at another stage.
    """
    secret_of_hop = [secrets.token_bytes(32) for _ in range(group.size - 1)]
    messages = [
        Connect(links, to_next, from_previous)
        for to_next, from_previous in zip([*secret_of_hop, None], [None, *secret_of_hop], strict=True)
    ]
    check_connections(group, ask(group, messages, Connected, CONNECT_S, "connect to its neighbours"))


def check_connections(group: StageGroup, answers: Sequence[Connected]) -> None:
    """Check that another stage reports each TCP connection of a stage, with local and remote address exchanged.

    If a process forwards data between two stages, each of its two connections has only one end at a stage.

    Raises:
        StageStartError: a connection has another end; names the stage and the other end.
    """
    connections = {connection for answer in answers for connection in answer.connections}
    for rank, answer in enumerate(answers):
        for local, remote in answer.connections:
            if (remote, local) not in connections:
                raise StageStartError(
                    f"stage {rank} on {group.host(rank)} is connected to a process that is no stage: the other end of "
                    f"{local} is {remote}; a process on a host, or address translation, is between two stages"
                )


def ask(
    group: StageGroup,
    messages: Sequence[ToStage],
    wanted: type[Reply],
    silence_s: float,
    task: str,
    on_progress: Callable[[int, FromStage], None] | None = None,
) -> tuple[Reply, ...]:
    """Send every stage its message, then ``collect`` a ``wanted`` message from each."""
    for rank, message in enumerate(messages):
        group.send(rank, message)
    return collect(group, wanted, range(group.size), silence_s, task, on_progress)


def collect(
    group: StageGroup,
    wanted: type[Reply],
    ranks: Sequence[int],
    silence_s: float,
    task: str,
    on_progress: Callable[[int, FromStage], None] | None = None,
) -> tuple[Reply, ...]:
    """Return one ``wanted`` message from each of ``ranks``, in that order; pass progress to ``on_progress``.

    ``task`` completes the sentence "it had to ..." in errors.

    Raises:
        StageStartError, StageFault: a stage reported a fault, or ended.
        ProtocolError: a stage sent any other message.
        StageSilent: no message from any stage for ``silence_s``, or a host is silent or a stage stopped; names it.
    """
    answers: dict[int, Reply] = {}
    monitor = HealthMonitor(group)
    deadline = time.monotonic() + silence_s
    while any(rank not in answers for rank in ranks):
        received = monitor.receive(deadline)
        if received is None:
            missing = ", ".join(monitor.describe(rank) for rank in ranks if rank not in answers)
            raise StageSilent(f"no message for {silence_s:.0f} s from {missing}, which had to {task}")
        if isinstance(received, Woken):  # by StageGroup.wake; no message
            continue
        deadline = time.monotonic() + silence_s
        rank, message = received.rank, received.message
        if isinstance(message, wanted) and rank in ranks and rank not in answers:
            answers[rank] = message
        elif on_progress is not None and isinstance(message, LayerLoaded | DownloadProgress):
            on_progress(rank, message)
        else:
            problem = f"sent an unexpected {type(message).__name__}: it had to {task}"
            raise ProtocolError(f"stage {rank} on {group.host(rank)} {problem}", rank)
    return tuple(answers[rank] for rank in ranks)


def _ip(address: str) -> str:
    return address.partition(":")[0]
