"""Tests of hops inside one process, the environment of mlx.distributed, and the detection of an unknown process."""

import json
import queue
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import mlx.core as mx
import pytest

from mlx_k2.errors import StageFault
from mlx_k2.protocol.messages import JacclLinks, RingLinks
from mlx_k2.stage.transport import Transport, group_environment, prove_hops
from mlx_k2.testing.queue_transport import QueueTransport

SECRET = bytes(range(32))


def make_neighbours() -> tuple[QueueTransport, QueueTransport]:
    """Return the transports of two neighbours: the second receives what the first sends."""
    hop: queue.SimpleQueue[mx.array] = queue.SimpleQueue()
    return QueueTransport(queue.SimpleQueue(), hop), QueueTransport(hop, queue.SimpleQueue())


def test_arrays_are_received_in_the_order_in_which_they_were_sent() -> None:
    first, second = make_neighbours()
    for number in range(3):
        first.send(mx.full((2, 4), number))
    received = [second.receive((2, 4), mx.int32) for _ in range(3)]
    assert [array[0, 0].item() for array in received] == [0, 1, 2]


@pytest.mark.parametrize(("shape", "dtype"), [((4, 2), mx.float32), ((2, 4), mx.bfloat16)])
def test_receiving_another_shape_or_dtype_than_sent_fails_an_assertion(shape: tuple[int, int], dtype: mx.Dtype) -> None:
    first, second = make_neighbours()
    first.send(mx.zeros((2, 4)))
    with pytest.raises(AssertionError, match="expected"):
        second.receive(shape, dtype)


def test_a_single_stage_neither_sends_nor_receives() -> None:
    with pytest.raises(AssertionError):
        Transport().send(mx.zeros(1))
    with pytest.raises(AssertionError):
        Transport().receive((1,), mx.float32)
    prove_hops(Transport(), to_next=None, from_previous=None)


def test_prove_hops_accepts_the_agreed_bytes_at_both_ends() -> None:
    first, second = make_neighbours()
    prove_hops(first, to_next=SECRET, from_previous=None)
    prove_hops(second, to_next=None, from_previous=SECRET)


def test_prove_hops_refuses_a_neighbour_with_other_bytes() -> None:
    first, second = make_neighbours()
    prove_hops(first, to_next=bytes(32), from_previous=None)
    with pytest.raises(StageFault, match="an unknown process is connected as the previous stage"):
        prove_hops(second, to_next=None, from_previous=SECRET)


@pytest.fixture
def settings_file() -> Iterator[IO[bytes]]:
    """Yield an empty file for `group_environment`, whose path a variable names."""
    with tempfile.TemporaryFile() as empty_file:
        yield empty_file


def test_the_ring_environment_has_the_rank_and_all_addresses(settings_file: IO[bytes]) -> None:
    links = RingLinks((("10.0.0.1:5000", "10.0.1.1:5001"), ("10.0.0.2:5000", "10.0.1.2:5001")))
    environment = group_environment(1, links, settings_file)
    assert environment.keys() == {"MLX_RANK", "MLX_HOSTFILE"}
    assert environment["MLX_RANK"] == "1"
    assert json.loads(Path(environment["MLX_HOSTFILE"]).read_text()) == [list(host) for host in links.addresses]


@pytest.mark.parametrize("is_ring", [False, True])
def test_the_jaccl_environment_has_the_devices_and_the_address_of_rank_0(
    settings_file: IO[bytes], is_ring: bool
) -> None:
    links = JacclLinks(((None, "rdma_en5"), (("rdma_en3", "rdma_en4"), None)), "10.0.0.1:32323", ring=is_ring)
    environment = group_environment(0, links, settings_file)
    assert environment["MLX_RANK"] == "0"
    assert environment["MLX_JACCL_COORDINATOR"] == "10.0.0.1:32323"
    assert ("MLX_JACCL_RING" in environment) == is_ring
    devices = json.loads(Path(environment["MLX_IBV_DEVICES"]).read_text())
    assert devices == [[None, "rdma_en5"], [["rdma_en3", "rdma_en4"], None]]
