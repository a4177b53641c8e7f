"""Check of each kernel against the reference on this machine. Knows no files and no model.

The kernels were written without a Mac. So a machine uses a kernel only after the kernel agreed with plain MLX there.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_k2.kernels import reference, variants
from mlx_k2.kernels.dispatch import run
from mlx_k2.kernels.reference import RouterRule
from mlx_k2.kernels.stack import CODES_PER_WORD, GROUP_SIZE, ExpertStack
from mlx_k2.kernels.tuning import Tuning
from mlx_k2.kernels.variants import Experts, Perform

DECODE, BATCH, PREFILL, ROUTER = "decode", "batch", "prefill", "router"

CHECKED_TOKENS = {DECODE: (1,), BATCH: (2, 4, 8, 16), PREFILL: (40,), ROUTER: (1, 2, 4, 8, 16, 17)}
"""Numbers of tokens to check: one for each compiled variant of the kernel. 40 pairs of one expert fill more than a
tile, and for 17 tokens the router computes logits without its kernel."""
_NUM_CODES = 17
"""Number of experts with different codes, which others repeat: random codes for 384 experts would take minutes."""
_TEMPORARY_FAULTS = (
    "Command buffer execution failed",
    "Insufficient Memory",
    "Unable to allocate",
    "bad_alloc",
    "SubmissionsIgnored",
)
"""Texts in errors that the machine's state causes, not the kernel: its memory is full, or its GPU is busy."""

TOLERANCE = {mx.bfloat16: 1e-2, mx.float32: 1e-5}
"""Largest allowed error divided by the largest output: twice one kernel's error, because both kernels of a layer round
to the activations' dtype."""


class LayerShape(NamedTuple):
    """The sizes and the dtype that the kernels are compiled for."""

    hidden_size: int
    intermediate_size: int
    top_k: int
    dtype: mx.Dtype
    num_experts: int = 16


class KernelCheck(NamedTuple):
    """The result of one kernel's check."""

    kernel: str
    usable: bool
    error: float | None = None  # largest error divided by the largest output; None if the kernel did not run
    reason: str = ""  # why it is not usable; empty if it is
    is_temporary: bool = False  # the machine's state caused the failure: check the kernel again at the next start
    slower: tuple[str, ...] = ()  # token ranges in which plain MLX is faster

    @property
    def warning(self) -> str:
        """One line for the user about a kernel that is not usable."""
        again = "the next start checks it again" if self.is_temporary else "`mlx-k2 kernels` there checks it again"
        return f"the {self.kernel} kernel is not used here ({self.reason}); plain MLX runs instead; {again}"


def check_kernel(name: str, shape: LayerShape, tuning: Tuning, perform: Perform = run) -> KernelCheck:
    """Run one kernel (DECODE, BATCH, PREFILL or ROUTER) and compare it with the reference in float32.

    Run each compiled variant of the kernel, until one is wrong. ``perform`` executes a dispatch.
    """
    tolerance, largest_error = TOLERANCE[shape.dtype], 0.0
    try:
        stack = None if name == ROUTER else random_stack(shape, shape.num_experts)
        for tokens in CHECKED_TOKENS[name]:
            if stack is None:
                error = _router_error(shape, tokens, perform)
            else:
                error = _experts_error(name, shape, tokens, stack, tuning, perform)
            if not error <= tolerance:
                reason = f"off by {error:.1e} of the largest output for {tokens} tokens, more than {tolerance:.0e}"
                return KernelCheck(name, usable=False, error=error, reason=reason)
            largest_error = max(largest_error, error)
    except Exception as failure:  # noqa: BLE001  any error of MLX or of a compiler makes the kernel unusable
        reason = str(failure).strip().split("\n", maxsplit=1)[0] or type(failure).__name__
        is_temporary = isinstance(failure, MemoryError) or any(fault in str(failure) for fault in _TEMPORARY_FAULTS)
        return KernelCheck(name, usable=False, reason=reason, is_temporary=is_temporary)
    return KernelCheck(name, usable=True, error=largest_error)


_COMPUTATIONS: dict[str, Experts] = {
    DECODE: variants.decode_experts,
    BATCH: variants.batch_experts,
    PREFILL: variants.prefill_experts,
}


def _experts_error(
    name: str, shape: LayerShape, tokens: int, stack: ExpertStack, tuning: Tuning, perform: Perform
) -> float:
    key = mx.random.key(1)
    x = mx.random.normal((tokens, shape.hidden_size), key=key).astype(shape.dtype)
    ids = random_expert_ids(tokens, shape.num_experts - 1, shape.top_k)
    # all tokens choose the last expert: it gets more than one tile, and find_tile finds it last
    ids[:, -1] = shape.num_experts - 1
    weights = mx.random.uniform(0.1, 1.0, (tokens, shape.top_k), key=key)
    actual = _COMPUTATIONS[name](x, ids, weights, stack, tuning, perform)
    return _relative_error(actual, reference.routed_experts(x.astype(mx.float32), ids, weights, in_float32(stack)))


def _router_error(shape: LayerShape, tokens: int, perform: Perform) -> float:
    num_experts = shape.num_experts
    key = mx.random.key(2)
    hidden = mx.random.normal((tokens, shape.hidden_size), key=key).astype(shape.dtype)
    weight = (mx.random.normal((num_experts, shape.hidden_size), key=key) * shape.hidden_size**-0.5).astype(shape.dtype)
    bias = mx.random.uniform(shape=(num_experts,), key=key)
    rule = RouterRule(shape.top_k, normalize=True, scaling_factor=2.5)
    ids, weights = variants.route(hidden, weight, bias, rule, perform)
    scores = mx.sigmoid(hidden.astype(mx.float32) @ weight.astype(mx.float32).T)
    biased = scores + bias
    # Experts of nearly equal scores may come in either order. So compare the chosen scores with the best ones, not ids.
    best_scores = mx.sort(biased, axis=-1)[:, -shape.top_k :]
    chosen_scores = mx.sort(mx.take_along_axis(biased, ids, axis=-1), axis=-1)
    unscaled_weights = mx.take_along_axis(scores, ids, axis=-1)
    expected_weights = unscaled_weights / unscaled_weights.sum(axis=-1, keepdims=True) * rule.scaling_factor
    return max(_relative_error(chosen_scores, best_scores), _relative_error(weights, expected_weights))


def random_stack(shape: LayerShape, num_experts: int) -> ExpertStack:
    """Return experts with random codes and scales, whose outputs have about the magnitude of their inputs."""

    def projection(seed: int, outputs: int, inputs: int) -> tuple[mx.array, mx.array]:
        key = mx.random.key(seed)
        num_distinct = min(num_experts, _NUM_CODES)
        shape_of_words = (num_distinct, outputs, inputs // CODES_PER_WORD)
        low_key, high_key = mx.random.split(key)
        low = mx.random.randint(0, 1 << 16, shape_of_words, mx.uint32, key=low_key)
        high = mx.random.randint(0, 1 << 16, shape_of_words, mx.uint32, key=high_key)
        packed = ((high << 16) | low)[mx.arange(num_experts) % num_distinct]
        scale = mx.random.uniform(0.1, 0.4, (num_experts, outputs, inputs // GROUP_SIZE), key=key) * inputs**-0.5
        return packed, scale.astype(shape.dtype)

    gate = projection(3, shape.intermediate_size, shape.hidden_size)
    up = projection(4, shape.intermediate_size, shape.hidden_size)
    return ExpertStack(*gate, *up, *projection(5, shape.hidden_size, shape.intermediate_size))


def random_expert_ids(tokens: int, num_experts: int, top_k: int) -> mx.array:
    """Return the ids of ``top_k`` different random experts for each token: (tokens, top_k) uint32."""
    scores = mx.random.uniform(shape=(tokens, num_experts), key=mx.random.key(tokens))
    return mx.argsort(scores, axis=-1)[:, :top_k]


def in_float32(stack: ExpertStack) -> ExpertStack:
    """Return the same experts with float32 scales, so that MLX computes in float32."""
    return stack._replace(
        gate_scale=stack.gate_scale.astype(mx.float32),
        up_scale=stack.up_scale.astype(mx.float32),
        down_scale=stack.down_scale.astype(mx.float32),
    )


def _relative_error(actual: mx.array, expected: mx.array) -> float:
    """Return the largest difference divided by the largest expected value; infinity if a value is not finite."""
    actual_values, expected_values = np.array(actual.astype(mx.float32)), np.array(expected)
    if not np.isfinite(actual_values).all():
        return float("inf")
    return float(np.abs(actual_values - expected_values).max() / np.abs(expected_values).max())
