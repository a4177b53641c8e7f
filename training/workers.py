"""Data-parallel training processes, each with its own batches. Knows nothing of models or data.

The processes average their gradients over gloo, so that all have the same weights after every step.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

Item = TypeVar("Item")


@dataclass(frozen=True)
class Worker:
    """One of `count` processes."""

    number: int
    count: int

    @property
    def is_first(self) -> bool:
        """Whether this process logs and saves for all processes."""
        return self.number == 0

    def shard(self, stream: Iterator[Item]) -> Iterator[Item]:
        """Return this worker's items of the stream: every `count`-th item, from item `number` on."""
        return itertools.islice(stream, self.number, None, self.count)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all workers."""
        if self.count == 1:
            return
        joined = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(joined)
        joined /= self.count
        parts = joined.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def work_together(count: int, work: Callable[..., None], *arguments: object) -> None:
    """Run `work(worker, *arguments)` in `count` processes of one core each. Wait for all of them."""
    if count == 1:
        torch.set_num_threads(1)
        work(Worker(0, 1), *arguments)
        return
    # All workers are on this machine, so gloo uses loopback.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if os.uname().sysname == "Darwin" else "lo"
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_join, (count, f"file://{folder}/rendezvous", work, arguments), nprocs=count)


def _join(number: int, count: int, rendezvous: str, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=number, world_size=count)
    work(Worker(number, count), *arguments)
    dist.destroy_process_group()
