"""Hidden states from one stage to the next. Knows shapes, not layers; no message of the control plane.

MLX's operations are lazy: ``receive`` returns an array that is not there yet, and evaluating it is the wait. Whoever
evaluates does so one operation at a time, in plan order, which is the only tag on the wire.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from typing import IO, Protocol

import mlx.core as mx
import numpy as np

from mlx_k2.errors import StageFault
from mlx_k2.protocol.messages import JacclLinks, RingLinks


class Transport(Protocol):
    """The two hops of a stage: from the one before it, to the one after it."""

    def receive(self, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """What the stage before sends next, lazily."""

    def send(self, array: mx.array) -> None:
        """Hand an evaluated array to the stage after; returns when the system has taken all of it."""


class DistributedTransport:
    """Hops over mlx.core.distributed."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self._group = group

    def receive(self, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """What the stage before sends next, lazily."""
        return mx.distributed.recv(shape, dtype, self._group.rank() - 1, group=self._group)

    def send(self, array: mx.array) -> None:
        """Hand an evaluated array to the stage after; returns when the system has taken all of it."""
        mx.eval(mx.distributed.send(array, self._group.rank() + 1, group=self._group))


class NoNeighbours:
    """The transport of a single stage, which never uses it."""

    def receive(self, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """Never called."""
        raise AssertionError(f"a single stage was to receive {dtype} {tuple(shape)}")

    def send(self, array: mx.array) -> None:
        """Never called."""
        raise AssertionError(f"a single stage was to send {array.dtype} {array.shape}")


def join_group(rank: int, links: RingLinks | JacclLinks) -> mx.distributed.Group:
    """Start mlx.distributed's backend as ``rank``; it holds the GIL until every neighbour is there.

    Raises:
        StageFault: a neighbour did not answer, or the backend is not to be had here.
    """
    backend = "ring" if isinstance(links, RingLinks) else "jaccl"
    with tempfile.TemporaryFile() as file:  # without a name: a stage that is killed in here leaves nothing
        os.environ.update(group_environment(rank, links, file))
        try:
            group = mx.distributed.init(strict=True, backend=backend)
        except RuntimeError as error:
            raise StageFault(f"the {backend} connection to a neighbour failed: {error}") from None
    assert group.rank() == rank, f"{backend} says rank {group.rank()}, the plan {rank}"
    return group


def group_environment(rank: int, links: RingLinks | JacclLinks, file: IO[bytes]) -> dict[str, str]:
    """What mlx.distributed reads from the environment; the file that it names is ``file``, which is written here."""
    file.write(json.dumps(links.addresses if isinstance(links, RingLinks) else links.devices).encode())
    file.seek(0)  # which also writes it; on macOS whoever opens /dev/fd/N goes on where we are
    path = f"/dev/fd/{file.fileno()}"
    if isinstance(links, RingLinks):
        return {"MLX_RANK": str(rank), "MLX_HOSTFILE": path}
    environment = {
        "MLX_RANK": str(rank),
        "MLX_IBV_DEVICES": path,
        "MLX_JACCL_COORDINATOR": links.coordinator,
    }
    return environment | ({"MLX_JACCL_RING": "1"} if links.ring else {})


def prove_hops(transport: Transport, to_next: bytes | None, from_previous: bytes | None) -> None:
    """Before anything else: pass on the bytes that the coordinator gave both ends of each hop.

    MLX's ring accepts whoever connects to its port; this is how a stage knows that it was its neighbour.

    Raises:
        StageFault: other bytes arrived.
    """
    if from_previous is not None:
        received = transport.receive((len(from_previous),), mx.uint8)
        mx.eval(received)
        if np.asarray(received).tobytes() != from_previous:
            raise StageFault("a stranger is connected in place of the previous stage: its first bytes are not ours")
    if to_next is not None:
        transport.send(mx.array(list(to_next), dtype=mx.uint8))
