"""Comparison of implementations of K2's routed experts in one layer: mlx-k2's kernels, plain MLX and mlx-lm.

python -m bench.kernels [--save] [--tokens 1 8]

Columns: "bytes needed" counts each distinct chosen expert once, at 4.5 bits per weight. mlx-lm stores biases, which
makes 5.0 bits. On a CPU scales and biases are float32: 5.0 bits in plain MLX and 6.0 in mlx-lm. "bytes loaded" is the
size of a kernel's loads of weights and scales, counted by running it in the executor of tests/metal_cpu. "launches" are
kernel dispatches. "GB/s" are the bytes needed, divided by the median time. Times are measured on the current device, in
bfloat16 on a GPU and in float32 on a CPU; a kernel that cannot run on the device has no time. All implementations
compute the same experts for the same tokens, in turn. --save appends the rows to results/kernels.csv.
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

HIDDEN, INTERMEDIATE, TOP_K = 7168, 2048, 8  # as in Kimi K2
NUM_EXPERTS = 24  # 0.6 GB; Kimi K2's 384 would need 9.5 GB
NUM_ROUNDS = 5
CPU_TIMING = {"chain": 1, "repeats": 1}  # one run for a time: a layer takes 0.25 s on a CPU
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


class KernelRow(NamedTuple):
    """A row of results/kernels.csv, as HEADER names the cells. A cell without a value is ''."""

    device: str
    dtype: str
    tokens: int
    experts_chosen: int
    way: str
    launches: int
    bytes_needed: int
    bytes_loaded: int | str
    milliseconds: str
    gigabytes_per_s: str


class Implementation(NamedTuple):
    """An implementation of the layer. ``layer`` is None if it cannot run on this device."""

    name: str
    layer: Layer | None
    dispatches: int
    bytes_needed: int
    bytes_loaded: int | None = None
    """None where loads are not counted."""


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/kernels.csv")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 8], help="numbers of tokens per call  [default: 1 8]"
    )
    arguments = parser.parse_args()
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    dtype = mx.bfloat16 if on_gpu else mx.float32
    shape = LayerShape(HIDDEN, INTERMEDIATE, TOP_K, dtype)
    stack = random_stack(shape, NUM_EXPERTS)
    mx.eval(stack)
    rows = [row for num_tokens in arguments.tokens for row in measure(stack, num_tokens, on_gpu=on_gpu)]
    for cells in (HEADER, *rows):
        print(" | ".join(str(cell) for cell in cells))
    if arguments.save:
        print(f"saved to {save_rows('kernels', HEADER, rows)}")


def measure(stack: ExpertStack, num_tokens: int, *, on_gpu: bool) -> list[KernelRow]:
    """Time the implementations in turn; return a row for each."""
    ids = random_expert_ids(num_tokens, NUM_EXPERTS, TOP_K)
    num_distinct = int(np.unique(np.array(ids)).size)
    implementations = [
        kernel_implementation(stack, ids, on_gpu=on_gpu),
        plain_implementation(stack, ids),
        *mlx_lm_implementations(stack, ids),
    ]
    times: dict[str, list[float]] = {implementation.name: [] for implementation in implementations}
    for _ in range(NUM_ROUNDS):
        for implementation in implementations:
            if implementation.layer is not None:
                timing = time_layer(implementation.layer, stack, num_tokens, TOP_K, **({} if on_gpu else CPU_TIMING))
                times[implementation.name].append(timing.seconds)
    dtype = str(stack.gate_scale.dtype).removeprefix("mlx.core.")
    rows = []
    for name, _, dispatches, needed, loaded in implementations:
        seconds = times[name]
        milliseconds = summarize([1e3 * time_s for time_s in seconds]) if seconds else ""
        rate = f"{needed / float(np.median(seconds)) / 1e9:.2f}" if seconds else ""
        setting = (experts.chip(), dtype, num_tokens, num_distinct)
        loaded_cell = "" if loaded is None else loaded
        rows.append(KernelRow(*setting, name, dispatches, needed, loaded_cell, milliseconds, rate))
    return rows


def needed_bytes(stack: ExpertStack, ids: mx.array, *, bits_a_weight: float) -> int:
    """Return the bytes of the chosen experts, each distinct expert counted once."""
    weights = 3 * stack.hidden_size * stack.intermediate_size
    return int(np.unique(np.array(ids)).size * weights * bits_a_weight / 8)


def kernel_implementation(stack: ExpertStack, ids: mx.array, *, on_gpu: bool) -> Implementation:
    """Return mlx-k2's kernels. Their bytes are counted with bfloat16 scales, as on a Mac, also on a CPU."""
    num_tokens = ids.shape[0]
    name, _, compute = experts.kernel_for(num_tokens)

    def layer_with(perform: Perform) -> Layer:
        def layer(x: mx.array, ids: mx.array, weights: mx.array, stack: ExpertStack) -> mx.array:
            return compute(x, ids, weights, stack, DEFAULT, perform)

        return layer

    bytes_loaded = 0

    def execute_and_count(dispatch: Dispatch) -> list[mx.array]:
        nonlocal bytes_loaded
        executed: Executed = execute(dispatch, mode=Mode.BYTES)
        weight_names = [name for name in dispatch.text.inputs if name.endswith(("_packed", "_scale"))]
        bytes_loaded += executed.bytes_loaded(*weight_names)
        return executed.outputs

    arrays = (array.astype(mx.bfloat16) if array.dtype == mx.float32 else array for array in stack)
    mac_stack = ExpertStack(*arrays)
    x, weights = mx.zeros((num_tokens, HIDDEN), mx.bfloat16), mx.full((num_tokens, TOP_K), 1 / TOP_K)
    mx.eval(mac_stack, x, weights, ids)
    dispatches = count_dispatches(lambda x: layer_with(kernel_in_graph)(x, ids, weights, mac_stack), x)
    layer_with(execute_and_count)(x, ids, weights, mac_stack)
    needed = needed_bytes(stack, ids, bits_a_weight=4.5)
    layer = layer_with(run) if on_gpu else None
    return Implementation(f"mlx-k2 {name} kernels", layer, sum(dispatches.values()), needed, bytes_loaded)


def plain_implementation(stack: ExpertStack, ids: mx.array) -> Implementation:
    """Return the plain MLX code that mlx-k2 runs where no kernel is used."""
    dispatches = num_dispatches(reference.routed_experts, stack, ids)
    needed = needed_bytes(stack, ids, bits_a_weight=BITS + 8 * stack.gate_scale.dtype.size / GROUP_SIZE)
    return Implementation("mlx-k2 plain MLX", reference.routed_experts, dispatches, needed)


def mlx_lm_implementations(stack: ExpertStack, ids: mx.array) -> list[Implementation]:
    """Return mlx-lm's SwitchGLU followed by the weighted sum, and its three gather_qmm alone. Both store biases.

    In the second, an addition of gate and up replaces the activation, and nothing is weighted.
    """
    packed_weights, scales = stack[0::2], stack[1::2]  # of gate, up, down
    biases = [scale * -ZERO_POINT for scale in scales]
    block = SwitchGLU(GROUP_SIZE, GROUP_SIZE, 1)  # as small as possible, because its weights are replaced
    for name, packed, scale, bias in zip(
        ("gate_proj", "up_proj", "down_proj"), packed_weights, scales, biases, strict=True
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

    bits_a_weight = BITS + 2 * 8 * stack.gate_scale.dtype.size / GROUP_SIZE  # a scale and a bias
    needed = needed_bytes(stack, ids, bits_a_weight=bits_a_weight)
    return [
        Implementation("mlx-lm SwitchGLU", switch_glu, num_dispatches(switch_glu, stack, ids), needed),
        Implementation("gather_qmm alone", products, num_dispatches(products, stack, ids), needed),
    ]


def num_dispatches(layer: Callable[..., mx.array], stack: ExpertStack, ids: mx.array) -> int:
    """Return the number of dispatches of a layer in plain MLX."""
    x, weights = mx.zeros((ids.shape[0], HIDDEN), stack.gate_scale.dtype), mx.full(ids.shape, 1 / TOP_K)
    mx.eval(x, weights, ids)
    return sum(count_dispatches(lambda x: layer(x, ids, weights, stack), x).values())


if __name__ == "__main__":
    main()
