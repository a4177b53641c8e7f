"""Tests of the check of a ring's connections: an unknown process at one end of a connection is an error."""

import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from mlx_k2.cluster.hostfile import Backend, Host, Hostfile
from mlx_k2.deployment.bring_up import CONNECT_S, check_connections, collect, connect, links, prepare
from mlx_k2.errors import StageFault, StageStartError
from mlx_k2.launch.group import StageGroup
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.protocol.messages import Connect, Connected, Hello, RingLinks
from mlx_k2.weights.model_source import BUILTIN, ModelSource

PROOF = bytes(range(32))
"""In place of the random bytes with which the two stages of a hop check it."""
RETRY_S = 0.1
needs_two_loopback_addresses = pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux: 127.0.0.2 is an address of loopback there"
)


@contextmanager
def prepared_group(ips: tuple[str, ...] = ("127.0.0.1",)) -> Iterator[tuple[StageGroup, RingLinks]]:
    """Yield two real stages that have reserved their ports, and the addresses by which they can be connected."""
    hostfile = Hostfile(hosts=(Host(ssh="127.0.0.1", ips=ips),) * 2, backend=Backend.RING)
    with StageGroup([StageLocation()] * 2, lease_s=20.0, log=lambda _: None) as group:
        collect(group, Hello, range(2), silence_s=60.0, task="start")
        answers = prepare(group, hostfile, [ModelSource(path_or_repo=BUILTIN)] * 2)
        ring = links(hostfile, answers)
        assert isinstance(ring, RingLinks)
        yield group, ring


def test_stages_that_are_connected_to_each_other_are_accepted() -> None:
    with prepared_group() as (group, ring):
        connect(group, ring)


def forward(source: socket.socket, target: socket.socket) -> None:
    """Send everything from ``source`` to ``target`` until one of them is closed."""
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)


def relay(listener: socket.socket, address: str) -> None:
    """Forward in both directions between the first connection to ``listener`` and the stage at ``address``."""
    client, _ = listener.accept()
    stage = connect_when_open(address)
    for source, target in ((client, stage), (stage, client)):
        threading.Thread(target=forward, args=(source, target), daemon=True).start()


def connect_when_open(address: str) -> socket.socket:
    """Connect to ``address``; try again until the stage, which has been told to connect, listens there."""
    ip, _, port = address.partition(":")
    while True:
        with suppress(OSError):
            return socket.create_connection((ip, int(port)), timeout=10)
        threading.Event().wait(RETRY_S)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ips",
    [("127.0.0.1",), pytest.param(("127.0.0.1", "127.0.0.2"), marks=needs_two_loopback_addresses)],
    ids=["one cable", "the second of two cables"],
)
def test_a_process_that_relays_between_two_stages_is_an_error_before_anything_is_loaded(ips: tuple[str, ...]) -> None:
    """The random bytes that prove a hop do not show the relay, which forwards them."""
    with prepared_group(ips) as (group, ring), socket.create_server((ips[-1], 0)) as listener:
        (first, second) = ring.addresses
        threading.Thread(target=relay, args=(listener, second[-1]), daemon=True).start()
        redirected = RingLinks((first, (*second[:-1], f"{ips[-1]}:{listener.getsockname()[1]}")))
        group.send(0, Connect(redirected, to_next=PROOF, from_previous=None))
        group.send(1, Connect(ring, to_next=None, from_previous=PROOF))
        answers = collect(group, Connected, range(2), CONNECT_S, "connect")
        with pytest.raises(
            StageStartError, match=r"stage 0 on this machine is connected to a process that is no stage: the"
        ):
            check_connections(group, answers)


@pytest.mark.slow
@needs_two_loopback_addresses
@pytest.mark.parametrize("rank", [0, 1])
def test_an_unknown_process_that_connects_first_and_sends_nothing_is_named_in_less_than_15_s(rank: int) -> None:
    """Rank 0 accepts the process before it connects, and then reaches no neighbour.

    Rank 1 connects before it accepts: the test listens as its neighbour, and then the process is accepted.
    """
    with prepared_group() as (group, ring), socket.create_server(("127.0.0.2", 0)) as neighbour:
        neighbour_port = 9 if rank == 0 else neighbour.getsockname()[1]  # nothing listens on port 9
        addresses: list[tuple[str, ...]] = [(f"127.0.0.2:{neighbour_port}",)] * 2
        addresses[rank] = ring.addresses[rank]
        started_at = time.monotonic()
        proofs = {"to_next": PROOF, "from_previous": None} if rank == 0 else {"to_next": None, "from_previous": PROOF}
        group.send(rank, Connect(RingLinks(tuple(addresses)), **proofs))
        with connect_when_open(addresses[rank][0]), pytest.raises(StageFault) as caught:
            collect(group, Connected, [rank], CONNECT_S, "connect")
    assert time.monotonic() - started_at < 15
    error = str(caught.value)
    assert "(connecting to its neighbours" in error
    assert re.search(r"it wrote last: an unknown process at 127\.0\.0\.1:\d+ is connected to the ring", error)
