"""Measurement of one stage's hops over mlx.distributed, with the shapes that Kimi K2 sends. Knows no model."""

import time

import mlx.core as mx

from mlx_k2.cluster.host_facts import HopSpeed

NUM_TOKEN_VALUES = 7168
"""Number of values in the hidden state of one token of Kimi K2: 14 kB as bfloat16."""
NUM_ROUND_TRIPS = 30
NUM_LARGE_VALUES = 2 * 2**20
"""Number of values in a large array: 4 MiB as bfloat16, like a part of a prompt chunk."""
NUM_LARGE_ARRAYS = 16


def measure_hops(group: mx.distributed.Group) -> HopSpeed | None:
    """Answer the previous stage's measurement, then measure the hop to the next stage. Return None on the last stage.

    So one hop is measured after the other, and the measurements do not disturb each other.
    """
    rank = group.rank()
    if rank > 0:
        _answer(group, rank - 1)
    if rank == group.size() - 1:
        return None
    return _measure(group, rank + 1)


def _measure(group: mx.distributed.Group, next_rank: int) -> HopSpeed:
    token = mx.zeros((NUM_TOKEN_VALUES,), mx.bfloat16)
    large = mx.zeros((NUM_LARGE_VALUES,), mx.bfloat16)
    mx.eval(token, large)
    round_trips_s = []
    for _ in range(NUM_ROUND_TRIPS):
        start_s = time.perf_counter()
        mx.eval(mx.distributed.send(token, next_rank, group=group))
        mx.eval(mx.distributed.recv((NUM_TOKEN_VALUES,), mx.bfloat16, next_rank, group=group))
        round_trips_s.append(time.perf_counter() - start_s)
    start_s = time.perf_counter()
    for _ in range(NUM_LARGE_ARRAYS):
        mx.eval(mx.distributed.send(large, next_rank, group=group))
    mx.eval(mx.distributed.recv((NUM_TOKEN_VALUES,), mx.bfloat16, next_rank, group=group))
    elapsed_s = time.perf_counter() - start_s
    return HopSpeed(sorted(round_trips_s)[NUM_ROUND_TRIPS // 2] / 2, NUM_LARGE_ARRAYS * large.nbytes / elapsed_s)


def _answer(group: mx.distributed.Group, previous_rank: int) -> None:
    token = mx.zeros((NUM_TOKEN_VALUES,), mx.bfloat16)
    for _ in range(NUM_ROUND_TRIPS):
        mx.eval(mx.distributed.recv((NUM_TOKEN_VALUES,), mx.bfloat16, previous_rank, group=group))
        mx.eval(mx.distributed.send(token, previous_rank, group=group))
    for _ in range(NUM_LARGE_ARRAYS):
        mx.eval(mx.distributed.recv((NUM_LARGE_VALUES,), mx.bfloat16, previous_rank, group=group))
    mx.eval(mx.distributed.send(token, previous_rank, group=group))
