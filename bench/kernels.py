"""Routed experts of one Kimi K2 layer: bytes, dispatches and time of mlx-k2's kernels, of plain MLX and of mlx-lm.

python -m bench.kernels [--save] [--tokens 1 8]

"bytes needed": each distinct chosen expert once, at 4.5 bits per weight (mlx-lm stores biases: 5.0). "bytes loaded":
the kernel's loads of weights and scales, counted by running it in the executor of tests/metal_cpu. "launches" are
kernel dispatches. Times are measured on the current device, in bfloat16 on a GPU and in float32 on a CPU; a kernel that
cannot run on it has no time. Both programs compute the same experts for the same tokens in the same run, alternately.
--save appends the rows to results/kernels.csv.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU

from bench.graph_dispatches import count_dispatches, kernel_in_graph
from bench.measure import save_rows, summarize
from mlx_k2.kernels import experts, reference
from mlx_k2.kernels.dispatch import Dispatch, run
from mlx_k2.kernels.layer_time import Layer, time_layer
from mlx_k2.kernels.self_check import LayerShape, random_expert_ids, random_stack
from mlx_k2.kernels.stack import BITS, GROUP_SIZE, ZERO_POINT, ExpertStack
from mlx_k2.kernels.tuning import DEFAULT
from mlx_k2.kernels.variants import Perform
from tests.metal_cpu.execute import Executed, execute
from tests.metal_cpu.program import Mode

HIDDEN, INTERMEDIATE, TOP_K = 7168, 2048, 8  # Kimi K2's layer, but with fewer than its 384 experts
NUM_EXPERTS = 24
ROUNDS = 5
ON_CPU = {"chain": 1, "repeats": 1}  # a layer takes 0.25 s on a CPU
HEADER = (
    "device",
    "dtype",
    "tokens",
    "experts chosen",
    "way",
    "launches",
    "bytes needed",
    "bytes loaded",
    "ms a layer: median (quartiles)",
    "GB/s",
)


class Implementation(NamedTuple):
    """One implementation of the layer."""

    name: str
    layer: Layer | None  # None if it cannot run on this device
    dispatches: int
    bytes_needed: int
    bytes_loaded: int | None  # None if not counted


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/kernels.csv")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8], help="tokens in a call")
    arguments = parser.parse_args()
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    dtype = mx.bfloat16 if on_gpu else mx.float32
    shape = LayerShape(HIDDEN, INTERMEDIATE, TOP_K, dtype)
    stack = random_stack(shape, NUM_EXPERTS)
    mx.eval(stack)
    device = experts.chip()
    rows = [
        (device, str(dtype).removeprefix("mlx.core."), *cells)
        for tokens in arguments.tokens
        for cells in measured(stack, tokens, on_gpu=on_gpu)
    ]
    for cells in (HEADER, *rows):
        print(" | ".join(str(cell) for cell in cells))
    if arguments.save:
        print(f"saved to {save_rows('kernels', HEADER, rows)}")


def measured(stack: ExpertStack, tokens: int, *, on_gpu: bool) -> list[tuple[object, ...]]:
    """Return one row for each implementation. They are timed alternately."""
    ids = random_expert_ids(tokens, NUM_EXPERTS, TOP_K)
    distinct = int(np.unique(np.array(ids)).size)
    implementations = [
        kernel_implementation(stack, ids, on_gpu=on_gpu),
        plain_implementation(stack, ids),
        *mlx_lm_implementations(stack, ids),
    ]
    times: dict[str, list[float]] = {implementation.name: [] for implementation in implementations}
    for _ in range(ROUNDS):
        for implementation in implementations:
            if implementation.layer is not None:
                timing = time_layer(implementation.layer, stack, tokens, TOP_K, **({} if on_gpu else ON_CPU))
                times[implementation.name].append(timing.seconds)
    return [
        (tokens, distinct, *cells(implementation, times[implementation.name])) for implementation in implementations
    ]


def cells(implementation: Implementation, seconds: list[float]) -> tuple[object, ...]:
    """Return the cells as printed. A cell without a value is empty."""
    milliseconds = summarize([1e3 * value for value in seconds]) if seconds else ""
    rate = f"{implementation.bytes_needed / float(np.median(seconds)) / 1e9:.2f}" if seconds else ""
    loaded = "" if implementation.bytes_loaded is None else implementation.bytes_loaded
    return implementation.name, implementation.dispatches, implementation.bytes_needed, loaded, milliseconds, rate


def needed_bytes(stack: ExpertStack, ids: mx.array, *, bits_a_weight: float) -> int:
    """Return the bytes of the chosen experts, each distinct expert counted once."""
    weights = 3 * stack.hidden_size * stack.intermediate_size
    return int(np.unique(np.array(ids)).size * weights * bits_a_weight / 8)


def kernel_implementation(stack: ExpertStack, ids: mx.array, *, on_gpu: bool) -> Implementation:
    """Return mlx-k2's kernels. Their loads are counted in bfloat16, which a Mac would use."""
    tokens = ids.shape[0]
    name, _, compute = experts.kernel_for(tokens)

    def perform(how: Perform) -> Layer:
        def layer(x: mx.array, ids: mx.array, weights: mx.array, stack: ExpertStack) -> mx.array:
            return compute(x, ids, weights, stack, DEFAULT, how)

        return layer

    loaded = 0

    def counting(dispatch: Dispatch) -> list[mx.array]:
        nonlocal loaded
        executed: Executed = execute(dispatch, mode=Mode.BYTES)
        loaded += executed.bytes_loaded(*(n for n in dispatch.text.inputs if n.endswith(("_packed", "_scale"))))
        return executed.outputs

    as_on_a_mac = ExpertStack(*(a.astype(mx.bfloat16) if a.dtype == mx.float32 else a for a in stack))
    x, weights = mx.zeros((tokens, HIDDEN), mx.bfloat16), mx.full((tokens, TOP_K), 1 / TOP_K)
    mx.eval(as_on_a_mac, x, weights, ids)
    dispatches = count_dispatches(lambda x: perform(kernel_in_graph)(x, ids, weights, as_on_a_mac), x)
    perform(counting)(x, ids, weights, as_on_a_mac)
    needed = needed_bytes(stack, ids, bits_a_weight=4.5)
    return Implementation(
        f"mlx-k2 {name} kernels", perform(run) if on_gpu else None, sum(dispatches.values()), needed, loaded
    )


def plain_implementation(stack: ExpertStack, ids: mx.array) -> Implementation:
    """Return the plain MLX code that mlx-k2 runs where no kernel is used."""
    dispatches = counted(reference.routed_experts, stack, ids)
    bits = BITS + 8 * stack.gate_scale.dtype.size / GROUP_SIZE
    return Implementation(
        "mlx-k2 plain MLX", reference.routed_experts, dispatches, needed_bytes(stack, ids, bits_a_weight=bits), None
    )


def mlx_lm_implementations(stack: ExpertStack, ids: mx.array) -> list[Implementation]:
    """Return mlx-lm's SwitchGLU followed by the weighted sum, and its three gather_qmm alone. Both store biases."""
    biases = [scale * -ZERO_POINT for scale in (stack.gate_scale, stack.up_scale, stack.down_scale)]
    block = SwitchGLU(GROUP_SIZE, GROUP_SIZE, 1)
    for name, packed, scale, bias in zip(
        ("gate_proj", "up_proj", "down_proj"), stack[0::2], stack[1::2], biases, strict=True
    ):
        linear = block[name].to_quantized(group_size=GROUP_SIZE, bits=BITS)
        linear.weight, linear.scales, linear.biases = packed, scale, bias
        block[name] = linear
    mx.eval(biases)

    def switch_glu(x: mx.array, ids: mx.array, weights: mx.array, _: ExpertStack) -> mx.array:
        return (block(x, ids) * weights[..., None]).sum(axis=-2).astype(x.dtype)

    def products(x: mx.array, ids: mx.array, _weights: mx.array, stack: ExpertStack) -> mx.array:
        def product(rows: mx.array, packed: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
            return mx.gather_qmm(rows, packed, scale, bias, rhs_indices=ids, group_size=GROUP_SIZE, bits=BITS)

        rows = x[:, None, None]
        gate = product(rows, stack.gate_packed, stack.gate_scale, biases[0])
        up = product(rows, stack.up_packed, stack.up_scale, biases[1])
        return product(gate + up, stack.down_packed, stack.down_scale, biases[2])[:, 0, 0]

    bits = BITS + 2 * 8 * stack.gate_scale.dtype.size / GROUP_SIZE
    needed = needed_bytes(stack, ids, bits_a_weight=bits)
    return [
        Implementation("mlx-lm SwitchGLU", switch_glu, counted(switch_glu, stack, ids), needed, None),
        Implementation("gather_qmm alone", products, counted(products, stack, ids), needed, None),
    ]


def counted(layer: Callable[..., mx.array], stack: ExpertStack, ids: mx.array) -> int:
    """Return the number of dispatches of a layer in plain MLX."""
    x, weights = mx.zeros((ids.shape[0], HIDDEN), stack.gate_scale.dtype), mx.full(ids.shape, 1 / TOP_K)
    mx.eval(x, weights, ids)
    return sum(count_dispatches(lambda x: layer(x, ids, weights, stack), x).values())


if __name__ == "__main__":
    main()
