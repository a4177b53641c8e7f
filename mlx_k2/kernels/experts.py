"""Choice of the kernel or the reference for routing and routed experts: by device, kernel check and shape."""

import functools
import logging
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_k2.kernels import check_cache, reference, variants
from mlx_k2.kernels.batched_decode import MAX_TOKENS
from mlx_k2.kernels.decode import MAX_TOP_K
from mlx_k2.kernels.dispatch import run
from mlx_k2.kernels.self_check import BATCH, DECODE, PREFILL, ROUTER, KernelCheck, LayerShape, check_kernel
from mlx_k2.kernels.stack import AffineStack, ExpertStack
from mlx_k2.kernels.tuning import DEFAULT as DEFAULT_TUNING
from mlx_k2.kernels.tuning import Tuning
from mlx_k2.kernels.variants import Experts

__all__ = ["ExpertStack", "prepare", "route", "routed_experts"]

logger = logging.getLogger(__name__)

METAL_KERNELS = (DECODE, BATCH, PREFILL, ROUTER)
CUDA_KERNELS = (DECODE, BATCH)  # the others use simdgroup matrices, or Metal names that cuda.h does not define


class UsableKernels(NamedTuple):
    """The kernels that may run on this machine, their sizes, and a warning for each kernel that may not."""

    kernels: frozenset[str]
    tuning: Tuning
    warnings: tuple[str, ...]


def route(
    hidden: mx.array,
    router_weight: mx.array,
    correction_bias: mx.array,
    *,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scaling_factor: float,
) -> tuple[mx.array, mx.array]:
    """Choose experts: hidden (tokens, hidden) -> ids (tokens, top_k) uint32, weights (tokens, top_k) float32.

    `reference.route` defines the rule.
    """
    one_group = top_groups >= num_groups and top_k <= MAX_TOP_K and router_weight.dtype == hidden.dtype
    if one_group and _backend_kernels():
        shape = LayerShape(hidden.shape[1], 0, top_k, hidden.dtype)
        if ROUTER in usable(shape).kernels:
            return variants.route(
                hidden,
                router_weight,
                correction_bias,
                top_k=top_k,
                normalize=normalize,
                scaling_factor=scaling_factor,
            )
    return reference.route(
        hidden,
        router_weight,
        correction_bias,
        top_k=top_k,
        num_groups=num_groups,
        top_groups=top_groups,
        normalize=normalize,
        scaling_factor=scaling_factor,
    )


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
        here = usable(LayerShape(stack.hidden_size, stack.intermediate_size, top_k, x.dtype))
        name, compute = kernel_for(x.shape[0])
        if name in here.kernels:
            return compute(x, expert_ids, expert_weights, stack, here.tuning, run)
    return reference.routed_experts(x, expert_ids, expert_weights, stack)


def kernel_for(tokens: int) -> tuple[str, Experts]:
    """Return the kernel for this number of tokens.

    DECODE and BATCH read each chosen expert's weights once, PREFILL once per tile of 32 pairs.
    """
    if tokens == 1:
        return DECODE, variants.decode_experts
    if tokens <= MAX_TOKENS:
        return BATCH, variants.batch_experts
    return PREFILL, variants.prefill_experts


def prepare(stack: ExpertStack | AffineStack, top_k: int, dtype: mx.Dtype) -> tuple[str, ...]:
    """Check the kernels for this layer and activations of ``dtype`` now, not at the first token.

    Return a warning for each kernel that plain MLX replaces. Return nothing without a GPU: there is nothing to check.
    """
    if not _backend_kernels():
        return ()
    shipped = stack.experts if isinstance(stack, AffineStack) else stack
    warnings = usable(LayerShape(shipped.hidden_size, 0, top_k, dtype)).warnings
    if isinstance(stack, AffineStack):
        return (*warnings, "the experts' kernels compute in the checkpoint's dtype only; plain MLX runs instead")
    return (*usable(LayerShape(shipped.hidden_size, shipped.intermediate_size, top_k, dtype)).warnings, *warnings)


@functools.cache
def usable(shape: LayerShape) -> UsableKernels:
    """Return the kernels that agree with the reference for this shape. Each is checked once per machine and cached."""
    cached = checks(shape, check_cache.DEFAULT_DIRECTORY)
    names = frozenset(check.kernel for check in cached.checks if check.usable)
    warnings = tuple(check.warning for check in cached.checks if not check.usable)
    return UsableKernels(names, cached.tuning or DEFAULT_TUNING, warnings)


def checks(shape: LayerShape, directory: Path) -> check_cache.CachedChecks:
    """Return the checks for this shape. Run those that are not cached, log a warning for each failure, and cache them.

    A shape of intermediate size 0 means the router alone.
    """
    path = check_cache.cache_path(directory, shape, chip())
    cached = check_cache.load(path) or check_cache.CachedChecks([], None)
    names = _kernels_for(shape)
    known = {check.kernel for check in cached.checks}
    for name in names:
        if name in known:
            continue
        # if the check crashes the process, the next process reads this entry and does not use the kernel
        started = KernelCheck(name, False, None, "an earlier check did not come back")
        check_cache.store(path, cached.with_check(started), chip())
        check = check_kernel(name, shape, DEFAULT_TUNING)
        if not check.usable:
            logger.warning(check.warning)
        cached = cached.with_check(check)
        check_cache.store(path, cached, chip())
    return cached


def new_checks(shape: LayerShape) -> list[KernelCheck]:
    """Check this machine's kernels for this shape now, whatever is cached. Cache nothing."""
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
