"""Routing and routed experts, computed by a kernel or the reference: chosen by device, kernel check and shape."""

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
"""Fewest tokens of a long chunk: from 4 pairs per expert of K2 on, MLX's own product (GatherQMM::eval_gpu) reads each
expert once."""
TOKEN_RANGES = {DECODE: (DECODE,), BATCH: (BATCH,), PREFILL: (SHORT, LONG)}
"""The ranges of numbers of tokens in which each kernel of routed experts is timed and used."""
TIMED_TOKENS = {DECODE: 1, BATCH: 8, SHORT: 64, LONG: 2048}
"""The number of tokens with which a kernel is timed for each token range."""
MAX_UNFINISHED_CHECKS = 2
"""Number of unfinished checks of a kernel after which it is not checked again and not used."""


class UsableKernels(NamedTuple):
    """The token ranges whose kernels are used on this machine, the kernels' sizes, and warnings about failed checks."""

    token_ranges: frozenset[str]  # contains ROUTER, too, if the router's kernel is used
    tuning: Tuning
    warnings: tuple[str, ...]


class KernelChoice(NamedTuple):
    """A kernel of routed experts, a range of numbers of tokens for it, and its computation."""

    kernel: str
    token_range: str
    compute: Experts


def route(
    hidden: mx.array, router_weight: mx.array, correction_bias: mx.array, rule: RouterRule
) -> tuple[mx.array, mx.array]:
    """Choose experts: hidden (tokens, hidden) -> ids (tokens, top_k) uint32, weights (tokens, top_k) float32.

    `reference.route` defines the computation.
    """
    has_kernel = rule.top_groups >= rule.num_groups and rule.top_k <= MAX_TOP_K and router_weight.dtype == hidden.dtype
    if has_kernel and _backend_kernels():
        num_experts, hidden_size = router_weight.shape
        shape = LayerShape(hidden_size, 0, rule.top_k, hidden.dtype, num_experts)  # 0: the router alone
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
        kernels = usable(shape)
        choice = kernel_for(x.shape[0])
        if choice.token_range in kernels.token_ranges:
            return choice.compute(x, expert_ids, expert_weights, stack, kernels.tuning, run)
    return reference.routed_experts(x, expert_ids, expert_weights, stack)


def kernel_for(tokens: int) -> KernelChoice:
    """Return the kernel for this number of tokens, without regard to its check."""
    if tokens == 1:
        return KernelChoice(DECODE, DECODE, variants.decode_experts)
    if tokens <= MAX_TOKENS:
        return KernelChoice(BATCH, BATCH, variants.batch_experts)
    return KernelChoice(PREFILL, SHORT if tokens < LONG_FROM_TOKENS else LONG, variants.prefill_experts)


def warnings_for(shape: LayerShape) -> tuple[str, ...]:
    """Return warnings about kernels of experts and router that cannot be used; none without a GPU.

    ``shape.dtype`` is the dtype of activations.
    """
    if not _backend_kernels():
        return ()
    router_warnings = usable(shape._replace(intermediate_size=0)).warnings
    if shape.dtype != mx.bfloat16:
        return (*router_warnings, "the experts' kernels compute in the checkpoint's dtype only; plain MLX runs instead")
    return (*usable(shape).warnings, *router_warnings)


_adopted: dict[LayerShape, UsableKernels] = {}
"""The kernels that this process uses. A shape is missing until its checks are known."""


def usable(shape: LayerShape) -> UsableKernels:
    """Return the kernels to use for this shape; check them at the first call. Intermediate size 0: the router alone."""
    if shape not in _adopted:
        adopt(shape, checks(shape, check_cache.DEFAULT_DIRECTORY))
    return _adopted[shape]


def adopt(shape: LayerShape, cached: check_cache.CachedChecks) -> None:
    """Use the results of ``cached``, made by this or another process. A kernel without a result is not used."""
    results = {check.kernel: check for check in cached.checks}
    token_ranges: set[str] = set()
    warnings = []
    for name in _kernels_for(shape):
        unfinished = KernelCheck(name, usable=False, reason="its check did not finish", is_temporary=True)
        check = results.get(name, unfinished)
        if check.usable:
            token_ranges |= set(TOKEN_RANGES.get(name, (name,))) - set(check.slower)
        else:
            warnings.append(check.warning)
    _adopted[shape] = UsableKernels(frozenset(token_ranges), cached.tuning or DEFAULT_TUNING, tuple(warnings))


def checks(shape: LayerShape, directory: Path, *, again: bool = False) -> check_cache.CachedChecks:
    """Return the checks for this shape. Make and cache those that are missing, and log a warning for each failure.

    ``again``: ignore the cache. A check during which the process ends is tried twice in all. After a temporary fault a
    kernel is checked again at each call.
    """
    path = check_cache.cache_path(directory, shape, chip())
    with check_cache.locked(path):
        cached = (None if again else check_cache.load(path)) or check_cache.CachedChecks([], None)
        final = {check.kernel for check in cached.checks if not check.is_temporary}
        for name in _kernels_for(shape):
            if name in final:
                continue
            if cached.started.get(name, 0) >= MAX_UNFINISHED_CHECKS:
                check = KernelCheck(name, usable=False, reason=f"{MAX_UNFINISHED_CHECKS} checks did not finish")
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
    except Exception as failure:  # noqa: BLE001  the machine may lack memory for chunks of 2048 tokens
        return check._replace(usable=False, is_temporary=True, reason=f"it could not be timed: {failure}")


def slower_token_ranges(name: str, shape: LayerShape) -> tuple[str, ...]:
    """Return the token ranges of kernel ``name`` in which plain MLX is faster for this shape on this machine."""
    token_ranges = TOKEN_RANGES.get(name, ())
    if not token_ranges:
        return ()
    stack = random_stack(shape, shape.num_experts)
    mx.eval(stack)

    def seconds(layer: Layer, tokens: int) -> float:
        # short, since a stage waits for it
        return time_layer(layer, stack, tokens, shape.top_k, chain=2, repeats=2).seconds

    def is_slower(tokens: int) -> bool:
        return seconds(reference.routed_experts, tokens) < seconds(layer_of(tokens, DEFAULT_TUNING), tokens)

    return tuple(token_range for token_range in token_ranges if is_slower(TIMED_TOKENS[token_range]))


def layer_of(tokens: int, tuning: Tuning) -> Layer:
    """Return the computation of routed experts by the kernel for this number of tokens."""
    compute = kernel_for(tokens).compute
    return lambda x, ids, weights, stack: compute(x, ids, weights, stack, tuning, run)


def new_checks(shape: LayerShape) -> list[KernelCheck]:
    """Return new checks of this machine's kernels for this shape. Do not read or write the cache, and time nothing."""
    return [check_kernel(name, shape, DEFAULT_TUNING) for name in _kernels_for(shape)]


def _kernels_for(shape: LayerShape) -> list[str]:
    """Return this machine's kernels of routed experts, or of the router for intermediate size 0."""
    return [name for name in _backend_kernels() if (name == ROUTER) == (shape.intermediate_size == 0)]


@functools.cache
def chip() -> str:
    """Return the GPU's name in MLX, for instance "Apple M3 Ultra"."""
    return str(mx.device_info().get("device_name", "unknown"))


def _backend_kernels() -> tuple[str, ...]:
    """Return the kernels that exist for this machine's GPU; none if MLX computes on the CPU."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return ()
    if mx.metal.is_available():
        return METAL_KERNELS
    return CUDA_KERNELS if mx.cuda.is_available() else ()
