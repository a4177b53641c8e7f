"""Tests of the type check: it accepts the source that MLX generates for our kernels, and finds each kind of error."""

from typing import NamedTuple

import mlx.core as mx
import pytest

from mlx_k2.kernels import variants
from mlx_k2.kernels.dispatch import Dispatch, KernelText
from mlx_k2.kernels.reference import RouterRule
from mlx_k2.kernels.tuning import DEFAULT
from tests.metal_cpu.float64 import random_case
from tests.metal_cpu.generated import generated_source
from tests.metal_cpu.typecheck import type_errors

pytestmark = pytest.mark.timeout(60)


def sources(*, tokens: int, top_k: int, experts: int, dtype: mx.Dtype) -> dict[str, str]:
    """Return the source that MLX generates for each kernel, by name."""
    sources_by_name: dict[str, str] = {}

    def perform(dispatch: Dispatch) -> list[mx.array]:
        sources_by_name[dispatch.text.name] = generated_source(dispatch)
        outputs = zip(dispatch.output_shapes, dispatch.output_dtypes, strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    case = random_case(experts=experts, tokens=tokens, top_k=top_k, hidden=64, intermediate=64, dtype=dtype)
    for compute in (variants.decode_experts, variants.batch_experts, variants.prefill_experts):
        compute(case.x, case.expert_ids, case.expert_weights, case.stack, DEFAULT, perform)
    weight, bias = mx.zeros((experts, 64), dtype), mx.zeros(experts)
    variants.route(case.x, weight, bias, RouterRule(top_k, normalize=True, scaling_factor=2.0), perform)
    return sources_by_name


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 4, 6), (1, 8, 40), (3, 4, 6), (16, 8, 384)])
def test_every_kernel_passes_the_type_check(tokens: int, top_k: int, experts: int, dtype: mx.Dtype) -> None:
    sources_by_name = sources(tokens=tokens, top_k=top_k, experts=experts, dtype=dtype)
    assert len(sources_by_name) == 9  # two kernels each of decode, batch and router, and three of prefill
    for source in sources_by_name.values():
        assert type_errors(source) == []


class PlantedError(NamedTuple):
    """An error: in the source of `kernel` the text `old` is replaced by `new`."""

    kernel: str
    old: str
    new: str


ERRORS = {
    "a thread array as a device pointer": PlantedError(
        "decode_gate_up", "float scaled[GROUP];", "float scaled[GROUP]; const device float* z = scaled;"
    ),
    "a dropped address space": PlantedError(
        "decode_gate_up", "const device uint4* gate_codes", "const uint4* gate_codes"
    ),
    "a write through an input": PlantedError(
        "decode_gate_up", "float scaled[GROUP];", "x[0] = T(0); float scaled[GROUP];"
    ),
    "a double literal": PlantedError("decode_gate_up", "1.0f / 16.0f", "1.0 / 16.0"),
    "an undeclared name": PlantedError("decode_gate_up", "simd_sum(gate[r])", "simd_sums(gate[r])"),
    "a dropped const": PlantedError("decode_gate_up", "const device T* gate_scales", "device T* gate_scales"),
    "threadgroup memory as a device pointer": PlantedError(
        "decode_down", "float acc[R];", "const device float* z = parts; float acc[R];"
    ),
    "device memory as a threadgroup pointer": PlantedError(
        "prefill_gate_up", "multiply_group(x_tile, up_tile", "multiply_group(inputs, up_tile"
    ),
    "a shadowed name": PlantedError(
        "decode_down", "float scaled[GROUP];", "float scaled[GROUP]; { float acc = 0.0f; }"
    ),
}


@pytest.fixture(scope="module")
def bfloat16_sources() -> dict[str, str]:
    return sources(tokens=1, top_k=8, experts=40, dtype=mx.bfloat16)


@pytest.mark.parametrize("name", ERRORS)
def test_the_type_check_finds_each_planted_error(name: str, bfloat16_sources: dict[str, str]) -> None:
    kernel, old, new = ERRORS[name]
    source = bfloat16_sources[kernel]
    assert old in source
    assert type_errors(source.replace(old, new))


@pytest.mark.parametrize(("elements", "valid"), [(7, False), (8, True)])
def test_a_device_pointer_to_an_input_is_valid_only_from_eight_elements(elements: int, valid: bool) -> None:
    body = "const device float* p = a; out[thread_position_in_grid.x] = p[0];"
    dispatch = Dispatch(
        KernelText("small", inputs=("a",), outputs=("out",), source=body, header=""),
        inputs=(mx.zeros(elements),),
        template=(),
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=((1,),),
        output_dtypes=(mx.float32,),
    )
    assert (type_errors(generated_source(dispatch)) == []) is valid
