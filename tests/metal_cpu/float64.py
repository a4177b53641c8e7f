"""Random INT4 experts, and the computation of their outputs in float64 with which kernels are compared."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_k2.kernels.stack import ExpertStack

Float64Array = npt.NDArray[np.float64]

Codes = Callable[[np.random.Generator, int, int, int], npt.NDArray[np.uint32]]
"""Function of (experts, outputs, inputs) that returns packed codes, (experts, outputs, inputs / 8)."""
Scales = Callable[[np.random.Generator, int, int, int], npt.NDArray[np.float32]]
"""Function of (experts, outputs, groups) that returns scales of this shape."""

TOLERANCE = {mx.bfloat16: 4e-3, mx.float32: 1e-6}
"""Largest allowed error as a fraction of the largest output."""


class Case(NamedTuple):
    """Inputs of a layer's routed experts: tokens (tokens, hidden), ids and weights (tokens, top_k), and the experts."""

    x: mx.array
    expert_ids: mx.array
    expert_weights: mx.array
    stack: ExpertStack


def random_codes(rng: np.random.Generator, experts: int, outputs: int, inputs: int) -> npt.NDArray[np.uint32]:
    """Return uniformly random codes."""
    return rng.integers(0, 2**32, (experts, outputs, inputs // 8), dtype=np.uint32)


def random_scales(rng: np.random.Generator, experts: int, outputs: int, groups: int) -> npt.NDArray[np.float32]:
    """Return scales from 0.002 to 0.012."""
    return 0.002 + 0.01 * rng.random((experts, outputs, groups), dtype=np.float32)


def random_case(
    *,
    experts: int,
    tokens: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    dtype: mx.Dtype = mx.bfloat16,
    seed: int = 0,
    codes: Codes = random_codes,
    scales: Scales = random_scales,
) -> Case:
    """Return a random case. Each token chooses ``top_k`` different experts."""
    rng = np.random.default_rng(seed)

    def projection(outputs: int, inputs: int) -> tuple[mx.array, mx.array]:
        packed = mx.array(codes(rng, experts, outputs, inputs))
        return packed, mx.array(scales(rng, experts, outputs, inputs // 32)).astype(dtype)

    stack = ExpertStack(
        *projection(intermediate, hidden), *projection(intermediate, hidden), *projection(hidden, intermediate)
    )
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.uint32)
    return Case(
        mx.array(rng.standard_normal((tokens, hidden), dtype=np.float32)).astype(dtype),
        mx.array(ids),
        mx.array(rng.random((tokens, top_k), dtype=np.float32) + 0.1),
        stack,
    )


def to_float64(array: mx.array) -> Float64Array:
    """Return an MLX array as numpy in float64."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


ALL_ROWS = slice(None)


def unpack(packed: mx.array, scale: mx.array, expert: int, rows: slice = ALL_ROWS) -> Float64Array:
    """Return scale * (code - 8) for one expert's matrix, or for some of its rows."""
    words = np.array(packed[expert, rows])
    codes = (words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    values = codes.reshape(words.shape[0], -1).astype(np.float64) - 8
    weights: Float64Array = values * np.repeat(to_float64(scale[expert, rows]), 32, axis=-1)
    return weights


def swiglu(gate: Float64Array, up: Float64Array) -> Float64Array:
    """Return silu(gate) * up."""
    with np.errstate(over="ignore"):
        product: Float64Array = gate / (1 + np.exp(-gate)) * up
    return product


def gate_up(case: Case, rows: slice = ALL_ROWS) -> Float64Array:
    """Return swiglu of gate and up, (tokens, top_k, intermediate). ``rows`` limits the last axis."""
    x, ids, stack = to_float64(case.x), np.array(case.expert_ids), case.stack
    out = np.empty((*ids.shape, len(range(*rows.indices(stack.intermediate_size)))))
    for expert in np.unique(ids):
        tokens, slots = np.where(ids == expert)
        gate = x[tokens] @ unpack(stack.gate_packed, stack.gate_scale, int(expert), rows).T
        up = x[tokens] @ unpack(stack.up_packed, stack.up_scale, int(expert), rows).T
        out[tokens, slots] = swiglu(gate, up)
    return out


def down(case: Case, hidden: mx.array, rows: slice = ALL_ROWS) -> Float64Array:
    """Return the experts' weighted sum, (tokens, hidden), for a result of `gate_up`. ``rows`` limits the last axis."""
    inputs, ids, weights = to_float64(hidden), np.array(case.expert_ids), to_float64(case.expert_weights)
    stack = case.stack
    out = np.zeros((ids.shape[0], len(range(*rows.indices(stack.hidden_size)))))
    for expert in np.unique(ids):
        tokens, slots = np.where(ids == expert)
        products = inputs[tokens, slots] @ unpack(stack.down_packed, stack.down_scale, int(expert), rows).T
        np.add.at(out, tokens, weights[tokens, slots][:, None] * products)
    return out


def relative_error(actual: mx.array, expected: npt.NDArray[Any]) -> float:
    """Return max|error| / max|expected|, or infinity if an actual value is not finite."""
    values = to_float64(actual).reshape(expected.shape)
    if not np.isfinite(values).all():
        return float("inf")
    return float(np.abs(values - expected).max() / np.abs(expected).max())
