"""The partition of layers to hosts. Pure: knows sizes, memory and bandwidth, neither tensors nor machines.

A layer is never split. The embedding goes with the first layer, the head with the last. Of the splits that fit, the one
whose slowest stage is fastest is chosen, because a full pipeline is as fast as its slowest stage. The time of a stage
is the time in which its host reads the bytes that a decoded token needs.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence

import msgspec

from mlx_k2.errors import PartitionError


class LayerCost(msgspec.Struct, frozen=True):
    """The cost of a layer, the embedding or the head: bytes held, including its cache, and bytes read per token."""

    held_bytes: int
    read_bytes: int

    def __add__(self, other: "LayerCost") -> "LayerCost":
        return LayerCost(self.held_bytes + other.held_bytes, self.read_bytes + other.read_bytes)


class ModelCosts(msgspec.Struct, frozen=True, kw_only=True):
    """The costs of a model's embedding, layers and head."""

    embedding: LayerCost
    layers: tuple[LayerCost, ...]
    head: LayerCost

    def shard(self, first_layer: int, end_layer: int) -> LayerCost:
        """Return the cost of the stage with layers ``first_layer`` up to, not including, ``end_layer``."""
        total = sum(self.layers[first_layer:end_layer], LayerCost(0, 0))
        if first_layer == 0:
            total += self.embedding
        return total + self.head if end_layer == len(self.layers) else total


class HostCapacity(msgspec.Struct, frozen=True, kw_only=True):
    """The memory and bandwidth of a host for one stage.

    ``memory_bytes`` is the limit for shard and cache; None if it is not known yet: then anything fits. ``gb_per_s`` is
    the memory bandwidth; None: the slowest known bandwidth of all hosts is assumed.
    """

    name: str
    memory_bytes: int | None
    gb_per_s: float | None = None


class StageAssignment(msgspec.Struct, frozen=True, kw_only=True):
    """The layers of one stage, ``first_layer`` up to, not including, ``end_layer``, and their cost."""

    first_layer: int
    end_layer: int
    held_bytes: int
    read_bytes: int

    @property
    def num_layers(self) -> int:
        """The number of layers that the stage runs."""
        return self.end_layer - self.first_layer


def divide_layers(model: ModelCosts, hosts: Sequence[HostCapacity]) -> tuple[StageAssignment, ...]:
    """Return the fastest split of ``model`` over ``hosts``, a stage for each; of equally fast splits the most even one.

    Raises:
        PartitionError: there are more hosts than layers, or no split fits; states the numbers.
    """
    num_layers = len(model.layers)
    _check_num_hosts(num_layers, len(hosts))
    seconds = _read_seconds(model, hosts)
    slowest_s, _ = _best_cuts(num_layers, len(hosts), seconds, max)
    if math.isinf(slowest_s):
        raise PartitionError(_why_nothing_fits(model, hosts))

    def squared(host: int, first_layer: int, end_layer: int) -> float:
        stage_s = seconds(host, first_layer, end_layer)
        return stage_s * stage_s if stage_s <= slowest_s else math.inf

    _, cuts = _best_cuts(num_layers, len(hosts), squared, operator.add)  # the least sum of squares is the most even
    return _assignments(model, cuts)


def divide_as_requested(
    model: ModelCosts, hosts: Sequence[HostCapacity], layer_counts: Sequence[int]
) -> tuple[StageAssignment, ...]:
    """Return the split with the given number of layers for each stage.

    Raises:
        PartitionError: the counts do not match the model or the hosts, or a stage does not fit; states the numbers.
    """
    num_layers = len(model.layers)
    _check_num_hosts(num_layers, len(hosts))
    requested = ",".join(map(str, layer_counts))
    if len(layer_counts) != len(hosts):
        raise PartitionError(f"--split {requested} names {len(layer_counts)} stages, and there are {len(hosts)} hosts")
    if sum(layer_counts) != num_layers or min(layer_counts) < 1:
        raise PartitionError(
            f"--split {requested} assigns {sum(layer_counts)} layers: it must assign {num_layers}, at least 1 per stage"
        )
    assignments = _assignments(model, (0, *itertools.accumulate(layer_counts)))
    for stage, (assignment, host) in enumerate(zip(assignments, hosts, strict=True)):
        if host.memory_bytes is not None and assignment.held_bytes > host.memory_bytes:
            raise PartitionError(
                f"--split {requested} does not fit: stage {stage} needs {_gb(assignment.held_bytes)} and "
                f"{host.name} can hold {_gb(host.memory_bytes)}: give it fewer layers"
            )
    return assignments


def _check_num_hosts(num_layers: int, num_hosts: int) -> None:
    assert num_hosts >= 1
    if num_hosts > num_layers:
        raise PartitionError(
            f"there are {num_hosts} hosts and the model has {num_layers} layers: use at most {num_layers} hosts"
        )


_Cost = Callable[[int, int, int], float]  # the cost of an assignment: host, first layer, end layer


def _read_seconds(model: ModelCosts, hosts: Sequence[HostCapacity]) -> _Cost:
    """Return the cost function whose value is the seconds of reading per token, or infinity if a stage does not fit."""
    known = [host.gb_per_s for host in hosts if host.gb_per_s is not None]
    bytes_per_s = [1e9 * (host.gb_per_s or min(known, default=1.0)) for host in hosts]
    shard = functools.cache(model.shard)

    def seconds(host: int, first_layer: int, end_layer: int) -> float:
        cost, limit_bytes = shard(first_layer, end_layer), hosts[host].memory_bytes
        fits = limit_bytes is None or cost.held_bytes <= limit_bytes
        return cost.read_bytes / bytes_per_s[host] if fits else math.inf

    return seconds


def _best_cuts(
    num_layers: int, num_hosts: int, cost: _Cost, join: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """Return the lowest cost of all splits, and the cuts of that split: 0, the end layer of each host.

    ``join`` combines the costs of two hosts. Dynamic programming: ``best[end]`` is the result for the hosts so far and
    the layers before ``end``.
    """
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, (0,))] + [(math.inf, ())] * num_layers
    for host in range(num_hosts):
        extended: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())] * (num_layers + 1)
        for end in range(host + 1, num_layers - (num_hosts - host - 1) + 1):
            for first in range(host, end):
                before, cuts = best[first]
                joined = join(before, cost(host, first, end)) if before < math.inf else math.inf
                if joined < extended[end][0]:
                    extended[end] = (joined, (*cuts, end))
        best = extended
    return best[num_layers]


def _assignments(model: ModelCosts, cuts: Sequence[int]) -> tuple[StageAssignment, ...]:
    return tuple(
        StageAssignment(first_layer=first, end_layer=end, **msgspec.structs.asdict(model.shard(first, end)))
        for first, end in itertools.pairwise(cuts)
    )


def _why_nothing_fits(model: ModelCosts, hosts: Sequence[HostCapacity]) -> str:
    needed_bytes = model.shard(0, len(model.layers)).held_bytes
    limits = [(host.name, host.memory_bytes) for host in hosts if host.memory_bytes is not None]
    limit_bytes = sum(memory_bytes for _, memory_bytes in limits)
    listed = ", ".join(f"{name} {_gb(memory_bytes)}" for name, memory_bytes in limits)
    numbers = f"weights and cache need {_gb(needed_bytes)}, and the hosts can hold {_gb(limit_bytes)} ({listed})"
    if needed_bytes > limit_bytes:
        return f"the model does not fit: {numbers}: add a host or memory"
    largest_bytes = max(layer.held_bytes for layer in model.layers)
    return f"the model does not fit in whole layers of up to {_gb(largest_bytes)}: {numbers}: add a host or memory"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
