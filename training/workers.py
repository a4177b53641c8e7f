"""Processes that train one model together, each on batches of its own. Knows nothing of models or data.

Each averages what the others found (data parallelism over gloo), so all hold the same weights after every step.
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
        """Whether this one speaks and writes for all."""
        return self.number == 0

    def fraction(self, stream: Iterator[Item]) -> Iterator[Item]:
        """Every `count`-th item: its own part of what all workers read."""
        return itertools.islice(stream, self.number, None, self.count)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Puts the mean over all workers into each tensor."""
        if self.count == 1:
            return
        together = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(together)
        together /= self.count
        parts = together.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def work_together(count: int, work: Callable[..., None], *arguments: object) -> None:
    """Runs `work(worker, *arguments)` in `count` processes of one core each, and waits for all."""
    if count == 1:
        torch.set_num_threads(1)
        work(Worker(0, 1), *arguments)
        return
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if os.uname().sysname == "Darwin" else "lo"
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_join, (count, f"file://{folder}/meeting", work, arguments), nprocs=count)


def _join(number: int, count: int, meeting: str, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=count)
    work(Worker(number, count), *arguments)
    dist.destroy_process_group()
