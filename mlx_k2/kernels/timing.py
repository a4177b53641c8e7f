"""Measurement of the kernels' speed and best sizes on this machine, for `mlx-k2 kernels`."""

import mlx.core as mx
import msgspec

from mlx_k2.kernels import check_cache, experts, reference
from mlx_k2.kernels.layer_time import best_seconds, time_layer
from mlx_k2.kernels.report import KernelLine
from mlx_k2.kernels.self_check import BATCH, DECODE, KernelCheck, LayerShape, check_kernel, random_stack
from mlx_k2.kernels.stack import ExpertStack
from mlx_k2.kernels.tuning import Tuning

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


def untimed_line(check: KernelCheck) -> KernelLine:
    """Return the report's line about a kernel, without speeds."""
    return KernelLine(
        kernel=check.kernel,
        usable=check.usable,
        ran=check.error is not None,
        error=check.error,
        reason=check.reason,
    )


def kernel_lines(shape: LayerShape, stack: ExpertStack, tuning: Tuning) -> list[KernelLine]:
    """Return a line for each kernel of routed experts in each of its token ranges, with its speed and plain MLX's."""
    lines = []
    for check in experts.checks(shape, check_cache.DEFAULT_DIRECTORY).checks:
        for token_range in experts.TOKEN_RANGES[check.kernel]:
            tokens = experts.TIMED_TOKENS[token_range]
            layer = experts.layer_of(tokens, tuning)
            timing = time_layer(layer, stack, tokens, shape.top_k) if check.usable else None
            plain_timing = time_layer(reference.routed_experts, stack, tokens, shape.top_k)
            is_slower = token_range in check.slower
            line = msgspec.structs.replace(
                untimed_line(check),
                usable=check.usable and not is_slower,
                reason="plain MLX is faster" if is_slower else check.reason,
                tokens=tokens,
                gb_per_s=timing.gigabytes_per_second if timing else None,
                plain_mlx_gb_per_s=plain_timing.gigabytes_per_second,
            )
            lines.append(line)
    return lines


def best_tuning(shape: LayerShape, start: Tuning) -> Tuning:
    """Return the fastest sizes for decode and batch, searched one size at a time. Cache them for the next start."""
    stack = random_stack(shape, shape.num_experts)
    mx.eval(stack)

    def seconds(tuning: Tuning) -> float:
        return sum(
            time_layer(experts.layer_of(tokens, tuning), stack, tokens, shape.top_k).seconds
            for tokens in (experts.TIMED_TOKENS[DECODE], experts.TIMED_TOKENS[BATCH])
        )

    best, best_s = start, seconds(start)
    for field, size in CANDIDATES:
        candidate = best._replace(**{field: size})
        # each size compiles to a different kernel, which must agree with the reference
        if not all(check_kernel(name, shape, candidate).usable for name in (DECODE, BATCH)):
            continue
        candidate_s = seconds(candidate)
        if candidate_s < best_s:
            best, best_s = candidate, candidate_s
    path = check_cache.cache_path(check_cache.DEFAULT_DIRECTORY, shape, experts.chip())
    cached = experts.checks(shape, check_cache.DEFAULT_DIRECTORY)
    check_cache.store(path, msgspec.structs.replace(cached, tuning=best))
    return best


def plain_read_gigabytes_per_second(stack: ExpertStack) -> float:
    """Return the speed at which this device reads the packed weights, with only their maximum computed."""
    arrays = (stack.gate_packed, stack.up_packed, stack.down_packed)
    seconds = best_seconds(lambda: mx.eval([mx.max(array) for array in arrays]))
    return sum(array.nbytes for array in arrays) / seconds / 1e9
