"""Tests that the two ends of each connection of a ring are compared: a process between two stages is detected."""

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

HOP_SECRET = bytes(range(32))
RETRY_S = 0.1
TWO_LOOPBACK_ADDRESSES = pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux: 127.0.0.2 is an address of loopback there"
)


@contextmanager
def prepared_group(ips: tuple[str, ...] = ("127.0.0.1",)) -> Iterator[tuple[StageGroup, RingLinks]]:
    """Yield two real stages that hold their ports, and the links between them."""
    hostfile = Hostfile(hosts=(Host(ssh="127.0.0.1", ips=ips),) * 2, backend=Backend.RING)
    with StageGroup([StageLocation()] * 2, 20.0, lambda _: None) as group:
        collect(group, Hello, range(2), 60.0, "start")
        answers = prepare(group, hostfile, [ModelSource(path_or_repo=BUILTIN)] * 2)
        ring = links(hostfile, answers)
        assert isinstance(ring, RingLinks)
        yield group, ring


def test_stages_that_are_connected_to_each_other_are_accepted() -> None:
    with prepared_group() as (group, ring):
        connect(group, ring)


def forward(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)


def relay(listener: socket.socket, address: str) -> None:
    """Forward everything between the first connection to ``listener`` and ``address``."""
    ip, _, port = address.partition(":")
    near, _ = listener.accept()
    while True:
        with suppress(OSError):
            far = socket.create_connection((ip, int(port)))
            break
        threading.Event().wait(RETRY_S)  # until the stage listens
    for source, target in ((near, far), (far, near)):
        threading.Thread(target=forward, args=(source, target), daemon=True).start()


@pytest.mark.slow
@pytest.mark.parametrize(
    "ips",
    [("127.0.0.1",), pytest.param(("127.0.0.1", "127.0.0.2"), marks=TWO_LOOPBACK_ADDRESSES)],
    ids=["one cable", "the second of two cables"],
)
def test_a_process_that_forwards_what_two_stages_send_is_detected_before_anything_is_loaded(
    ips: tuple[str, ...],
) -> None:
    """MLX sends the hop's 32 bytes over the first connection only."""
    with prepared_group(ips) as (group, ring), socket.create_server((ips[-1], 0)) as listener:
        (first, second) = ring.addresses
        threading.Thread(target=relay, args=(listener, second[-1]), daemon=True).start()
        redirected = RingLinks((first, (*second[:-1], f"{ips[-1]}:{listener.getsockname()[1]}")))
        group.send(0, Connect(redirected, HOP_SECRET, None))
        group.send(1, Connect(ring, None, HOP_SECRET))
        answers = collect(group, Connected, range(2), CONNECT_S, "connect")  # the hop's bytes were forwarded
        with pytest.raises(
            StageStartError, match=r"stage 0 on this machine is connected to a process that is no stage: the"
        ):
            check_connections(group, answers)


@pytest.mark.slow
@TWO_LOOPBACK_ADDRESSES
@pytest.mark.parametrize("rank", [0, 1])
def test_another_process_that_connects_first_and_sends_nothing_is_named_at_once(rank: int) -> None:
    """Rank 0 accepts the process and then cannot reach its neighbour. Rank 1 reaches its own neighbour first."""
    with prepared_group() as (group, ring), socket.create_server(("127.0.0.2", 0)) as neighbour:
        addresses: list[tuple[str, ...]] = [(f"127.0.0.2:{neighbour.getsockname()[1] if rank else 9}",)] * 2
        addresses[rank] = ring.addresses[rank]
        ip, _, port = addresses[rank][0].partition(":")
        began = time.monotonic()
        group.send(
            rank, Connect(RingLinks(tuple(addresses)), HOP_SECRET if rank == 0 else None, HOP_SECRET if rank else None)
        )
        while True:
            with suppress(ConnectionRefusedError):
                other = socket.create_connection((ip, int(port)), timeout=10)
                break
        with other, pytest.raises(StageFault) as caught:
            collect(group, Connected, [rank], CONNECT_S, "connect")
    assert time.monotonic() - began < 15
    assert "(connecting to its neighbours" in str(caught.value)
    assert re.search(
        r"it wrote last: an unknown process at 127\.0\.0\.1:\d+ is connected to the ring", str(caught.value)
    )
