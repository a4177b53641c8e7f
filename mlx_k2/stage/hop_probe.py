"""Measurement of one stage's hops over mlx.distributed, with the shapes that Kimi K2 sends. Knows no model."""

import time

import mlx.core as mx

from mlx_k2.cluster.host_facts import HopSpeed

TOKEN_VALUES = 7168
"""Values in the hidden state of one token of Kimi K2: 14 kB as bfloat16."""
NUM_ROUND_TRIPS = 30
LARGE_VALUES = 2 * 2**20
"""Values in 4 MiB of bfloat16, like a part of a prompt chunk."""
NUM_LARGE = 16


def measure_hops(group: mx.distributed.Group) -> HopSpeed | None:
    """Answer the measurement of the previous stage, then the hop to the next stage. Return None on the last stage.

    Each hop is measured after the one before it, so that the measurements do not disturb each other.
    """
    rank = group.rank()
    if rank > 0:
        _answer(group, rank - 1)
    if rank == group.size() - 1:
        return None
    return _measure(group, rank + 1)


def _measure(group: mx.distributed.Group, other: int) -> HopSpeed:
    token = mx.zeros((TOKEN_VALUES,), mx.bfloat16)
    large = mx.zeros((LARGE_VALUES,), mx.bfloat16)
    mx.eval(token, large)
    trips = []
    for _ in range(NUM_ROUND_TRIPS):
        began = time.perf_counter()
        mx.eval(mx.distributed.send(token, other, group=group))
        mx.eval(mx.distributed.recv((TOKEN_VALUES,), mx.bfloat16, other, group=group))
        trips.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(NUM_LARGE):
        mx.eval(mx.distributed.send(large, other, group=group))
    mx.eval(mx.distributed.recv((TOKEN_VALUES,), mx.bfloat16, other, group=group))
    elapsed_s = time.perf_counter() - began
    return HopSpeed(sorted(trips)[len(trips) // 2] / 2, NUM_LARGE * large.nbytes / elapsed_s)


def _answer(group: mx.distributed.Group, other: int) -> None:
    token = mx.zeros((TOKEN_VALUES,), mx.bfloat16)
    for _ in range(NUM_ROUND_TRIPS):
        mx.eval(mx.distributed.recv((TOKEN_VALUES,), mx.bfloat16, other, group=group))
        mx.eval(mx.distributed.send(token, other, group=group))
    for _ in range(NUM_LARGE):
        mx.eval(mx.distributed.recv((LARGE_VALUES,), mx.bfloat16, other, group=group))
    mx.eval(mx.distributed.send(token, other, group=group))
