"""Transfer of hidden states from one stage to the next. Knows shapes, but no layers and no control messages.

MLX's operations are lazy: ``receive`` returns at once, and the evaluation of its array waits for the data. The caller
must evaluate one operation at a time, in the order of plans, because the data carries no other identification.
"""

import errno
import json
import os
import tempfile
from collections.abc import Sequence
from typing import IO

import mlx.core as mx
import numpy as np

from mlx_k2.errors import StageFault
from mlx_k2.protocol.messages import JacclLinks, RingLinks


class Transport:
    """The hops from the previous stage and to the next one. ``group`` None: a single stage, which has no hops."""

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        self._group = group

    def receive(self, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """Return the next array that the previous stage sends, lazily."""
        assert self._group is not None, f"a single stage was to receive {dtype} {tuple(shape)}"
        return mx.distributed.recv(shape, dtype, self._group.rank() - 1, group=self._group)

    def send(self, array: mx.array) -> None:
        """Send an evaluated array to the next stage. Return when the system has accepted all of it."""
        assert self._group is not None, f"a single stage was to send {array.dtype} {array.shape}"
        mx.eval(mx.distributed.send(array, self._group.rank() + 1, group=self._group))


def join_group(rank: int, links: RingLinks | JacclLinks) -> mx.distributed.Group:
    """Start mlx.distributed's backend as ``rank``. MLX holds the GIL until every neighbour is connected.

    Raises:
        StageFault: a neighbour did not answer, or the backend is not available on this host.
    """
    backend = "ring" if isinstance(links, RingLinks) else "jaccl"
    with tempfile.TemporaryFile() as file:  # unnamed: a stage that is killed in this block leaves no file
        os.environ.update(group_environment(rank, links, file))
        try:
            group = mx.distributed.init(strict=True, backend=backend)
        except RuntimeError as error:
            reason = ""
            if f"error: {errno.ECONNREFUSED})" in str(error):
                reason = "; its port is closed: it has ended, or another process connected to it first"
            raise StageFault(f"the {backend} connection to a neighbour failed: {error}{reason}") from None
    assert group.rank() == rank, f"{backend} reports rank {group.rank()}, the plan {rank}"
    return group


def group_environment(rank: int, links: RingLinks | JacclLinks, file: IO[bytes]) -> dict[str, str]:
    """Write the hosts or devices to ``file``; return the variables for mlx.distributed, one of which names ``file``."""
    file.write(json.dumps(links.addresses if isinstance(links, RingLinks) else links.devices).encode())
    file.seek(0)  # also flushes; on macOS an open of /dev/fd/N shares this file position
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
    """Exchange the bytes that the coordinator gave both ends of each hop, before any other transfer.

    MLX's ring accepts any connection to its port, and wrong bytes show that the peer is not the neighbour. A process in
    between that forwards the right bytes is detected by the coordinator: it compares both ends of each connection.

    Raises:
        StageFault: wrong bytes arrived.
    """
    if from_previous is not None:
        received = transport.receive((len(from_previous),), mx.uint8)
        mx.eval(received)
        if np.asarray(received).tobytes() != from_previous:
            raise StageFault("an unknown process is connected as the previous stage: its first bytes are wrong")
    if to_next is not None:
        transport.send(mx.array(list(to_next), dtype=mx.uint8))
