"""Measurement of the kernels' speed and best sizes on this machine, for `mlx-k2 kernels`. Uses no published figure."""

import time
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_k2.kernels import check_cache, experts, reference
from mlx_k2.kernels.dispatch import run
from mlx_k2.kernels.self_check import (
    BATCH,
    DECODE,
    KernelCheck,
    LayerShape,
    check_kernel,
    random_expert_ids,
    random_stack,
)
from mlx_k2.kernels.stack import ExpertStack
from mlx_k2.kernels.tuning import Tuning

Layer = Callable[[mx.array, mx.array, mx.array, ExpertStack], mx.array]

NUM_EXPERTS = 64  # 1.6 GB at K2's size, more than any cache holds
CHAIN = 8  # layers between two waits; each reads the output of the one before, as in a model
REPEATS = 5
TOKENS = {"decode": 1, "batch": 8, "prefill": 512}

CANDIDATES = (  # sizes to try one at a time, each against the best sizes so far
    ("gate_up_rows", 2),
    ("gate_up_rows", 8),
    ("gate_up_simdgroups", 1),
    ("gate_up_simdgroups", 4),
    ("down_rows", 2),
    ("down_rows", 8),
    ("batch_rows", 1),
    ("batch_rows", 4),
    ("batch_simdgroups", 4),
    ("batch_simdgroups", 16),
)


class Timing(NamedTuple):
    """Measured time of one implementation of routed experts."""

    seconds: float  # per layer, best of REPEATS
    bytes_needed: int  # weights of the distinct chosen experts, at 4.5 bits per weight

    @property
    def gigabytes_per_second(self) -> float:
        """Needed bytes divided by time."""
        return self.bytes_needed / self.seconds / 1e9


class KernelRow(NamedTuple):
    """One line of the kernel table."""

    check: KernelCheck
    tokens: int
    kernel: Timing | None  # None if the kernel may not run
    reference: Timing
    plain_read_gigabytes_per_second: float


def kernel_table(shape: LayerShape, tuning: Tuning) -> list[KernelRow]:
    """Return each kernel of routed experts: its check, its speed, and the speeds of plain MLX and of a plain read."""
    stack = random_stack(shape, NUM_EXPERTS)
    mx.eval(stack)
    read = plain_read_gigabytes_per_second(stack)
    rows = []
    for check in experts.checks(shape, check_cache.DEFAULT_DIRECTORY).checks:
        tokens = TOKENS[check.kernel]
        timing = time_layer(_kernel(tokens, tuning), stack, tokens, shape.top_k) if check.usable else None
        rows.append(
            KernelRow(check, tokens, timing, time_layer(reference.routed_experts, stack, tokens, shape.top_k), read)
        )
    return rows


def best_tuning(shape: LayerShape, start: Tuning) -> Tuning:
    """Return the fastest sizes for decode and batch, searched one size at a time. Cache them for the next start."""
    stack = random_stack(shape, NUM_EXPERTS)
    mx.eval(stack)

    def seconds(tuning: Tuning) -> float:
        return sum(
            time_layer(_kernel(tokens, tuning), stack, tokens, shape.top_k).seconds
            for tokens in (TOKENS["decode"], TOKENS["batch"])
        )

    best, best_seconds = start, seconds(start)
    for field, size in CANDIDATES:
        candidate = best._replace(**{field: size})
        if _agrees(shape, candidate) and (candidate_seconds := seconds(candidate)) < best_seconds:
            best, best_seconds = candidate, candidate_seconds
    path = check_cache.cache_path(check_cache.DEFAULT_DIRECTORY, shape, experts.chip())
    checks = experts.checks(shape, check_cache.DEFAULT_DIRECTORY).checks
    check_cache.store(path, check_cache.CachedChecks(checks, best), experts.chip())
    return best


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
    return Timing(_best_seconds(run_chain, repeats) / chain, per_expert * sum(distinct) // chain)


def plain_read_gigabytes_per_second(stack: ExpertStack) -> float:
    """Return the speed at which this device reads the packed weights, with only a maximum computed from them."""
    arrays = (stack.gate_packed, stack.up_packed, stack.down_packed)
    seconds = _best_seconds(lambda: mx.eval([mx.max(array) for array in arrays]))
    return sum(array.nbytes for array in arrays) / seconds / 1e9


def _best_seconds(work: Callable[[], None], repeats: int = REPEATS) -> float:
    work()  # the first call compiles
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _agrees(shape: LayerShape, tuning: Tuning) -> bool:
    """Return whether the kernels of these sizes agree with the reference. Each size compiles to a different kernel."""
    return all(check_kernel(name, shape, tuning).usable for name in (DECODE, BATCH))


def _kernel(tokens: int, tuning: Tuning) -> Layer:
    _, compute = experts.kernel_for(tokens)

    def layer(x: mx.array, ids: mx.array, weights: mx.array, stack: ExpertStack) -> mx.array:
        return compute(x, ids, weights, stack, tuning, run)

    return layer
