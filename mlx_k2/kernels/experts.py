"""Choice of the kernel or the reference for routing and routed experts: by device, kernel check and shape."""

import functools
import logging
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_k2.kernels import check_cache, reference, variants
from mlx_k2.kernels.decode import MAX_TOKENS, MAX_TOP_K
from mlx_k2.kernels.dispatch import run
from mlx_k2.kernels.layer_time import Layer, time_layer
from mlx_k2.kernels.reference import RouterRule
from mlx_k2.kernels.self_check import (
    BATCH,
    DECODE,
    PREFILL,
    ROUTER,
    KernelCheck,
    LayerShape,
    check_kernel,
    random_stack,
)
from mlx_k2.kernels.stack import AffineStack, ExpertStack
from mlx_k2.kernels.tuning import DEFAULT as DEFAULT_TUNING
from mlx_k2.kernels.tuning import Tuning
from mlx_k2.kernels.variants import Experts

logger = logging.getLogger(__name__)

METAL_KERNELS = (DECODE, BATCH, PREFILL, ROUTER)
CUDA_KERNELS = (DECODE, BATCH)  # the others use simdgroup matrices, or Metal names that cuda.h does not define


SHORT, LONG = "short chunk", "long chunk"
LONG_FROM_TOKENS = 192
"""From here on MLX's own product reads an expert once for its pairs (GatherQMM::eval_gpu: 4 pairs for each of 384)."""
TOKEN_RANGES = {DECODE: (DECODE,), BATCH: (BATCH,), PREFILL: (SHORT, LONG)}
TIMED_TOKENS = {DECODE: 1, BATCH: 8, SHORT: 64, LONG: 2048}
MAX_STARTS = 2
"""Number of checks of a kernel that may start and not finish. After them the kernel is not used."""


class UsableKernels(NamedTuple):
    """The ranges of tokens in which kernels run here, their sizes, and a warning for each kernel that may not."""

    token_ranges: frozenset[str]
    tuning: Tuning
    warnings: tuple[str, ...]


def route(
    hidden: mx.array, router_weight: mx.array, correction_bias: mx.array, rule: RouterRule
) -> tuple[mx.array, mx.array]:
    """Choose experts: hidden (tokens, hidden) -> ids (tokens, top_k) uint32, weights (tokens, top_k) float32.

    `reference.route` defines the computation.
    """
    one_group = rule.top_groups >= rule.num_groups and rule.top_k <= MAX_TOP_K and router_weight.dtype == hidden.dtype
    if one_group and _backend_kernels():
        shape = LayerShape(hidden.shape[1], 0, rule.top_k, hidden.dtype, router_weight.shape[0])
        if ROUTER in usable(shape).token_ranges:
            return variants.route(hidden, router_weight, correction_bias, rule)
    return reference.route(hidden, router_weight, correction_bias, rule)


def routed_experts(
    x: mx.array, expert_ids: mx.array, expert_weights: mx.array, stack: ExpertStack | AffineStack
) -> mx.array:
    """Return the chosen experts' SwiGLU outputs, weighted and summed in the order of the ids.

    x (tokens, hidden), expert_ids and expert_weights (tokens, top_k) -> (tokens, hidden).
    """
    top_k = expert_ids.shape[1]
    if isinstance(stack, AffineStack):
        return reference.routed_experts(x, expert_ids, expert_weights, stack)
    if _backend_kernels() and top_k <= MAX_TOP_K and stack.gate_scale.dtype == x.dtype:
        shape = LayerShape(stack.hidden_size, stack.intermediate_size, top_k, x.dtype, stack.num_experts)
        here = usable(shape)
        _, token_range, compute = kernel_for(x.shape[0])
        if token_range in here.token_ranges:
            return compute(x, expert_ids, expert_weights, stack, here.tuning, run)
    return reference.routed_experts(x, expert_ids, expert_weights, stack)


def kernel_for(tokens: int) -> tuple[str, str, Experts]:
    """Return the kernel for this number of tokens, its range of tokens, and its computation.

    DECODE and BATCH read each chosen expert's weights once, PREFILL once per tile of 32 pairs. A chunk is SHORT if
    plain MLX would read an expert once for each of its pairs.
    """
    if tokens == 1:
        return DECODE, DECODE, variants.decode_experts
    if tokens <= MAX_TOKENS:
        return BATCH, BATCH, variants.batch_experts
    return PREFILL, SHORT if tokens < LONG_FROM_TOKENS else LONG, variants.prefill_experts


def warnings_for(shape: LayerShape) -> tuple[str, ...]:
    """Return a warning for each kernel of experts and router that plain MLX replaces; nothing without a GPU."""
    if not _backend_kernels():
        return ()
    warnings = usable(shape._replace(intermediate_size=0)).warnings
    if shape.dtype != mx.bfloat16:
        return (*warnings, "the experts' kernels compute in the checkpoint's dtype only; plain MLX runs instead")
    return (*usable(shape).warnings, *warnings)


def usable(shape: LayerShape) -> UsableKernels:
    """Return the kernels that agree with the reference for this shape. Each is checked once per machine and cached."""
    if shape not in _adopted:
        adopt(shape, checks(shape, check_cache.DEFAULT_DIRECTORY))
    return _adopted[shape]


_adopted: dict[LayerShape, UsableKernels] = {}


def adopt(shape: LayerShape, cached: check_cache.CachedChecks) -> None:
    """Use the checks that this or another process made for this shape. Do not use a kernel without a result."""
    made = {check.kernel: check for check in cached.checks}
    missing = "its check did not finish"
    results = [made.get(name, KernelCheck(name, False, None, missing, passing=True)) for name in _kernels_for(shape)]
    token_ranges = frozenset(
        token_range
        for check in results
        if check.usable
        for token_range in (TOKEN_RANGES.get(check.kernel) or (check.kernel,))
        if token_range not in check.slower
    )
    warnings = tuple(check.warning for check in results if not check.usable)
    _adopted[shape] = UsableKernels(token_ranges, cached.tuning or DEFAULT_TUNING, warnings)


def checks(shape: LayerShape, directory: Path, *, again: bool = False) -> check_cache.CachedChecks:
    """Return the checks for this shape. Make those that are not cached, log a warning for each failure, and cache them.

    A shape of intermediate size 0 means the router alone. ``again``: ignore the cache. A check that ends its
    process, or whose process is ended, is tried twice. After a temporary fault the kernel is checked again each time.
    """
    path = check_cache.cache_path(directory, shape, chip())
    with check_cache.locked(path):
        cached = (None if again else check_cache.load(path)) or check_cache.CachedChecks([], None)
        for name in _kernels_for(shape):
            known = next((check for check in cached.checks if check.kernel == name), None)
            if known is not None and not known.passing:
                continue
            if cached.started.get(name, 0) >= MAX_STARTS:
                check = KernelCheck(name, False, None, f"{MAX_STARTS} checks did not finish")
            else:
                check_cache.store(path, cached.with_start(name))
                check = _check_and_time(name, shape)
            if not check.usable:
                logger.warning(check.warning)
            cached = cached.with_check(check)
            check_cache.store(path, cached)
        return cached


def _check_and_time(name: str, shape: LayerShape) -> KernelCheck:
    check = check_kernel(name, shape, DEFAULT_TUNING)
    try:
        return check._replace(slower=slower_token_ranges(name, shape)) if check.usable else check
    except Exception as failure:  # noqa: BLE001  memory for chunks of 2048 tokens may be missing
        return check._replace(usable=False, passing=True, reason=f"it could not be timed: {failure}")


def slower_token_ranges(name: str, shape: LayerShape) -> tuple[str, ...]:
    """Return the ranges of tokens of a kernel in which plain MLX is faster for this shape on this machine."""
    token_ranges = TOKEN_RANGES.get(name, ())
    if not token_ranges:
        return ()
    stack = random_stack(shape, shape.num_experts)
    mx.eval(stack)

    def seconds(layer: Layer, tokens: int) -> float:
        return time_layer(layer, stack, tokens, shape.top_k, chain=2, repeats=2).seconds

    return tuple(
        token_range
        for token_range in token_ranges
        if seconds(reference.routed_experts, TIMED_TOKENS[token_range])
        < seconds(layer_of(TIMED_TOKENS[token_range], DEFAULT_TUNING), TIMED_TOKENS[token_range])
    )


def layer_of(tokens: int, tuning: Tuning) -> Layer:
    """Return the layer of routed experts that the kernel for this number of tokens computes."""
    _, _, compute = kernel_for(tokens)
    return lambda x, ids, weights, stack: compute(x, ids, weights, stack, tuning, run)


def new_checks(shape: LayerShape) -> list[KernelCheck]:
    """Check this machine's kernels for this shape now, regardless of the cache. Cache nothing and time nothing."""
    return [check_kernel(name, shape, DEFAULT_TUNING) for name in _kernels_for(shape)]


def _kernels_for(shape: LayerShape) -> list[str]:
    return [name for name in _backend_kernels() if (name == ROUTER) == (shape.intermediate_size == 0)]


@functools.cache
def chip() -> str:
    """Return the GPU's name in MLX, for instance "Apple M3 Ultra"."""
    return str(mx.device_info().get("device_name", "unknown"))


def _backend_kernels() -> tuple[str, ...]:
    """Return the kernels that exist for this machine's GPU; none if MLX computes on the CPU."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return ()
    return METAL_KERNELS if mx.metal.is_available() else CUDA_KERNELS if mx.cuda.is_available() else ()
