"""Measurement of the time of one implementation of routed experts on this machine. Knows no kernel."""

import time
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_k2.kernels.self_check import random_expert_ids
from mlx_k2.kernels.stack import ExpertStack

Layer = Callable[[mx.array, mx.array, mx.array, ExpertStack], mx.array]
"""An implementation: (x, expert ids, expert weights, stack) -> outputs. `reference.routed_experts` has the shapes."""

CHAIN_LAYERS = 8  # layers per measurement; each reads the output of the one before, as in a model
REPEATS = 5


class Timing(NamedTuple):
    """Measured time of one implementation of routed experts."""

    seconds: float  # per layer, the best of all repeats
    bytes_needed: int  # per layer: weights of the distinct chosen experts, at 4.5 bits per weight in bfloat16

    @property
    def gigabytes_per_second(self) -> float:
        """Needed bytes divided by time."""
        return self.bytes_needed / self.seconds / 1e9


def time_layer(
    layer: Layer, stack: ExpertStack, tokens: int, top_k: int, *, chain: int = CHAIN_LAYERS, repeats: int = REPEATS
) -> Timing:
    """Return the best time per layer in a chain of ``chain`` layers.

    The expert ids are shifted by ``top_k`` from layer to layer, so that the weights of one are not cached for the next.
    """
    dtype = stack.gate_scale.dtype
    weights = mx.full((tokens, top_k), 1.0 / top_k)
    first_ids = random_expert_ids(tokens, stack.num_experts, top_k)
    ids_of_layers = [(first_ids + top_k * index) % stack.num_experts for index in range(chain)]
    x = mx.random.normal((tokens, stack.hidden_size), key=mx.random.key(0)).astype(dtype)
    mx.eval(ids_of_layers, weights, x)

    def run_chain() -> None:
        y = x
        for ids in ids_of_layers:
            y = layer(y, ids, weights, stack)
        mx.eval(y)

    num_experts_read = sum(np.unique(np.array(ids)).size for ids in ids_of_layers)
    expert_bytes = sum(array.nbytes for array in stack) // stack.num_experts
    return Timing(best_seconds(run_chain, repeats) / chain, expert_bytes * num_experts_read // chain)


def best_seconds(function: Callable[[], None], repeats: int = REPEATS) -> float:
    """Return the shortest time of ``repeats`` calls of a function, after one call that compiles."""
    function()
    best_s = float("inf")
    for _ in range(repeats):
        start_s = time.perf_counter()
        function()
        best_s = min(best_s, time.perf_counter() - start_s)
    return best_s
