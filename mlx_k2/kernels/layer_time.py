"""The time of one implementation of routed experts on this machine. Knows no kernel."""

import time
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_k2.kernels.self_check import random_expert_ids
from mlx_k2.kernels.stack import ExpertStack

Layer = Callable[[mx.array, mx.array, mx.array, ExpertStack], mx.array]

CHAIN = 8  # layers between two waits; each reads the output of the one before, as in a model
REPEATS = 5


class Timing(NamedTuple):
    """Measured time of one implementation of routed experts."""

    seconds: float  # per layer, best of REPEATS
    bytes_needed: int  # weights of the distinct chosen experts, at 4.5 bits per weight

    @property
    def gigabytes_per_second(self) -> float:
        """Needed bytes divided by time."""
        return self.bytes_needed / self.seconds / 1e9


def time_layer(
    layer: Layer, stack: ExpertStack, tokens: int, top_k: int, *, chain: int = CHAIN, repeats: int = REPEATS
) -> Timing:
    """Return the best time per layer in a chain of layers, each of which reads different experts."""
    dtype = stack.gate_scale.dtype
    weights = mx.full((tokens, top_k), 1.0 / top_k)
    base = random_expert_ids(tokens, stack.num_experts, top_k)
    ids = [(base + top_k * step) % stack.num_experts for step in range(chain)]
    x = mx.random.normal((tokens, stack.hidden_size), key=mx.random.key(0)).astype(dtype)
    mx.eval(ids, weights, x)

    def run_chain() -> None:
        y = x
        for chosen in ids:
            y = layer(y, chosen, weights, stack)
        mx.eval(y)

    distinct = [np.unique(np.array(chosen)).size for chosen in ids]
    per_expert = sum(array.nbytes for array in stack) // stack.num_experts
    return Timing(best_seconds(run_chain, repeats) / chain, per_expert * sum(distinct) // chain)


def best_seconds(work: Callable[[], None], repeats: int = REPEATS) -> float:
    """Return the shortest time of several calls. One call before them compiles."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
