"""Check of each kernel against the reference on this machine. Knows no files and no model.

The kernels were written without a Mac. A kernel is used only after it has agreed with plain MLX on the same machine.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_k2.kernels import reference, variants
from mlx_k2.kernels.batched_decode import MAX_TOKENS
from mlx_k2.kernels.dispatch import run
from mlx_k2.kernels.stack import CODES_PER_WORD, GROUP_SIZE, ExpertStack
from mlx_k2.kernels.tuning import Tuning
from mlx_k2.kernels.variants import Experts, Perform

DECODE, BATCH, PREFILL, ROUTER = "decode", "batch", "prefill", "router"

NUM_EXPERTS = 16  # enough for every path in the kernels; at K2's size such a stack takes 0.4 GB
PREFILL_TOKENS = 40  # more than one tile of pairs (32) for an expert that all tokens choose

TOLERANCE = {mx.bfloat16: 1e-2, mx.float32: 1e-5}
"""Largest allowed error divided by the largest output.

It is twice that of one kernel, because both halves of a layer round to the activations' dtype.
"""


class LayerShape(NamedTuple):
    """The sizes and the dtype that the kernels are compiled for."""

    hidden_size: int
    intermediate_size: int
    top_k: int
    dtype: mx.Dtype


class KernelCheck(NamedTuple):
    """The result of one kernel's check."""

    kernel: str
    usable: bool
    error: float | None  # largest error divided by the largest output; None if the kernel did not run
    reason: str  # why it is not usable; empty if it is

    @property
    def warning(self) -> str:
        """One line for the user about a kernel that is not usable."""
        return f"the {self.kernel} kernel is not used here ({self.reason}); plain MLX runs instead"


def check_kernel(name: str, shape: LayerShape, tuning: Tuning, perform: Perform = run) -> KernelCheck:
    """Run one kernel (DECODE, BATCH, PREFILL or ROUTER) and compare it with the reference in float32."""
    try:
        error = _router_error(shape, perform) if name == ROUTER else _experts_error(name, shape, tuning, perform)
    except Exception as failure:  # noqa: BLE001  any error of MLX or of a compiler makes the kernel unusable
        return KernelCheck(name, False, None, str(failure).strip().split("\n", maxsplit=1)[0] or type(failure).__name__)
    tolerance = TOLERANCE[shape.dtype]
    if not error <= tolerance:
        return KernelCheck(name, False, error, f"off by {error:.1e} of the largest output, more than {tolerance:.0e}")
    return KernelCheck(name, True, error, "")


_EXPERTS: dict[str, tuple[Experts, int]] = {
    DECODE: (variants.decode_experts, 1),
    BATCH: (variants.batch_experts, MAX_TOKENS // 2),
    PREFILL: (variants.prefill_experts, PREFILL_TOKENS),
}


def _experts_error(name: str, shape: LayerShape, tuning: Tuning, perform: Perform) -> float:
    compute, tokens = _EXPERTS[name]
    stack = random_stack(shape, NUM_EXPERTS)
    key = mx.random.key(1)
    x = mx.random.normal((tokens, shape.hidden_size), key=key).astype(shape.dtype)
    ids = random_expert_ids(tokens, NUM_EXPERTS, shape.top_k)
    weights = mx.random.uniform(0.1, 1.0, (tokens, shape.top_k), key=key)
    got = compute(x, ids, weights, stack, tuning, perform)
    return _relative_error(got, reference.routed_experts(x.astype(mx.float32), ids, weights, in_float32(stack)))


def _router_error(shape: LayerShape, perform: Perform) -> float:
    num_experts, tokens = 384, 3
    key = mx.random.key(2)
    hidden = mx.random.normal((tokens, shape.hidden_size), key=key).astype(shape.dtype)
    weight = (mx.random.normal((num_experts, shape.hidden_size), key=key) * shape.hidden_size**-0.5).astype(shape.dtype)
    bias = mx.random.uniform(shape=(num_experts,), key=key)
    scaling = 2.5
    ids, weights = variants.route(
        hidden, weight, bias, top_k=shape.top_k, normalize=True, scaling_factor=scaling, perform=perform
    )
    scores = mx.sigmoid(hidden.astype(mx.float32) @ weight.astype(mx.float32).T)
    biased = scores + bias
    # nearly equal scores may be chosen in either order, so compare scores, not ids: the chosen scores are the best,
    best = mx.sort(biased, axis=-1)[:, -shape.top_k :]
    chosen = mx.sort(mx.take_along_axis(biased, ids, axis=-1), axis=-1)
    # and each weight is computed from the score of its own expert
    own = mx.take_along_axis(scores, ids, axis=-1)
    own = own / own.sum(axis=-1, keepdims=True) * scaling
    return max(_relative_error(chosen, best), _relative_error(weights, own))


def random_stack(shape: LayerShape, num_experts: int) -> ExpertStack:
    """Return experts of random codes and scales, whose outputs have about the magnitude of their inputs."""

    def projection(seed: int, outputs: int, inputs: int) -> tuple[mx.array, mx.array]:
        key = mx.random.key(seed)
        words = (num_experts, outputs, inputs // CODES_PER_WORD)
        low, high = (mx.random.randint(0, 1 << 16, words, mx.uint32, key=k) for k in mx.random.split(key))
        packed = (high << 16) | low
        scale = mx.random.uniform(0.1, 0.4, (num_experts, outputs, inputs // GROUP_SIZE), key=key) * inputs**-0.5
        return packed, scale.astype(shape.dtype)

    gate = projection(3, shape.intermediate_size, shape.hidden_size)
    up = projection(4, shape.intermediate_size, shape.hidden_size)
    return ExpertStack(*gate, *up, *projection(5, shape.hidden_size, shape.intermediate_size))


def random_expert_ids(tokens: int, num_experts: int, top_k: int) -> mx.array:
    """Return random experts, distinct for each token: (tokens, top_k) uint32."""
    scores = mx.random.uniform(shape=(tokens, num_experts), key=mx.random.key(tokens))
    return mx.argsort(scores, axis=-1)[:, :top_k]


def in_float32(stack: ExpertStack) -> ExpertStack:
    """Return the same experts with float32 scales, so that MLX computes in float32."""
    return stack._replace(
        gate_scale=stack.gate_scale.astype(mx.float32),
        up_scale=stack.up_scale.astype(mx.float32),
        down_scale=stack.down_scale.astype(mx.float32),
    )


def _relative_error(got: mx.array, expected: mx.array) -> float:
    values, truth = np.array(got.astype(mx.float32)), np.array(expected)
    if not np.isfinite(values).all():
        return float("inf")
    return float(np.abs(values - truth).max() / np.abs(truth).max())
