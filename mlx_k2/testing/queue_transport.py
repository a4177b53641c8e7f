"""Hops between stages that run in one process."""

import queue
from collections.abc import Sequence

import mlx.core as mx

from mlx_k2.stage.transport import Transport


class QueueTransport(Transport):
    """A Transport in one process: the queue ``before`` comes from the previous stage, ``after`` goes to the next."""

    def __init__(self, before: "queue.SimpleQueue[mx.array]", after: "queue.SimpleQueue[mx.array]") -> None:
        self._before = before
        self._after = after

    def receive(self, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """Return the next array from the previous stage. Assert its shape and dtype."""
        array = self._before.get()
        assert array.shape == tuple(shape), f"expected {shape}, got {array.shape}"
        assert array.dtype == dtype, f"expected {dtype}, got {array.dtype}"
        return array

    def send(self, array: mx.array) -> None:
        """Send an evaluated array to the next stage."""
        self._after.put(array)
