"""Tests of planning each stage's layers, bytes and files from hosts and a model. No process, no tensor."""

import json
from collections.abc import Sequence

import msgspec
import pytest

from mlx_k2.cluster.hostfile import Backend, Host, Hostfile, local_hostfile
from mlx_k2.config import ModelConfig
from mlx_k2.deployment.cluster_options import ClusterOptions
from mlx_k2.deployment.plan import (
    HostMemory,
    RunShape,
    StagePlan,
    check_fit,
    choose_shape,
    plan_stages,
    quantization_warnings,
)
from mlx_k2.errors import PartitionError, RequestError, StageStartError
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.index import CheckpointIndex
from mlx_k2.weights.inventory import held_bytes, layer_specs, model_specs
from mlx_k2.weights.known_layout import thinking_config_fields
from tests.advice import follows_advice

SHAPE = RunShape(dtype="bfloat16", context_tokens=32768, num_slots=1, chunk_tokens=2048)
GB = 10**9
STUDIO = HostMemory(working_set_bytes=460 * GB, ram_bytes=512 * GB)
UNKNOWN = HostMemory(None, None)


def thinking(num_experts: int) -> ModelDescription:
    """Return Kimi K2 Thinking with ``num_experts`` experts, a file for each layer, and one for embedding and head."""
    fields = thinking_config_fields(n_routed_experts=num_experts)
    config = ModelConfig.from_json(json.dumps(fields).encode(), "config.json")
    files = {spec.name: f"layer-{layer}.safetensors" for layer in range(61) for spec in layer_specs(config, layer)}
    weight_map = {spec.name: files.get(spec.name, "ends.safetensors") for spec in model_specs(config)}
    return ModelDescription({}, config, CheckpointIndex(weight_map, "the index"), "digest", None)


K2_THINKING = thinking(384)
FEW_EXPERTS = thinking(8)


def studios(count: int) -> Hostfile:
    """Return a hostfile of Macs that differ only in their names."""
    return Hostfile(
        hosts=tuple(Host(ssh=f"mac-{rank}", ips=("10.0.0.1",)) for rank in range(count)), backend=Backend.RING
    )


def plan(
    model: ModelDescription, hostfile: Hostfile, memory: HostMemory, split: Sequence[int] | None = None
) -> tuple[StagePlan, ...]:
    """Return the plans of a model on hosts with equal memory."""
    return plan_stages(model, hostfile, [memory] * len(hostfile.hosts), split, SHAPE)


def test_two_equal_macs_run_32_and_29_layers_of_k2_thinking() -> None:
    first, last = plan(K2_THINKING, studios(2), STUDIO)
    assert (first.assignment.num_layers, last.assignment.num_layers) == (32, 29)
    assert (first.host.ssh, last.host.ssh) == ("mac-0", "mac-1")


@pytest.mark.parametrize("num_hosts", [1, 2, 5, 16])
def test_each_layer_is_on_one_stage_and_the_shards_sum_to_the_model(num_hosts: int) -> None:
    plans = plan(FEW_EXPERTS, studios(num_hosts), UNKNOWN)
    assert [stage.rank for stage in plans] == list(range(num_hosts))
    layers = [layer for stage in plans for layer in range(stage.assignment.first_layer, stage.assignment.end_layer)]
    assert layers == list(range(61))
    assert sum(stage.shard_bytes for stage in plans) == held_bytes(model_specs(FEW_EXPERTS.config), 2)


def test_a_stage_opens_only_its_layers_files_plus_embedding_or_head_at_the_ends() -> None:
    first, middle, last = plan(FEW_EXPERTS, studios(3), UNKNOWN)
    for stage in (first, middle, last):
        layers = {
            f"layer-{layer}.safetensors" for layer in range(stage.assignment.first_layer, stage.assignment.end_layer)
        }
        assert set(stage.files) - {"ends.safetensors"} == layers
        assert ("ends.safetensors" in stage.files) == (stage is not middle)


def test_plan_uses_an_explicit_split() -> None:
    assert [stage.assignment.num_layers for stage in plan(FEW_EXPERTS, studios(2), STUDIO, [31, 30])] == [31, 30]


@follows_advice(
    "--split 50,11 does not fit: stage 0 needs 400 GB and mac-0 can hold 4 GB: give it fewer layers",
)
def test_the_refusal_of_a_model_that_does_not_fit_names_the_sizes() -> None:
    with pytest.raises(
        PartitionError, match=r"need 59\d\.\d GB, and the hosts can hold 45\d\.\d GB \(mac-0 45\d\.\d GB\)"
    ):
        plan(K2_THINKING, studios(1), STUDIO)
    with pytest.raises(PartitionError, match=r"--split 50,11 does not fit: stage 0 needs 4\d\d\.\d GB and mac-0"):
        plan(K2_THINKING, studios(2), STUDIO, [50, 11])


def test_stages_on_one_machine_divide_its_memory() -> None:
    memory = HostMemory(None, ram_bytes=600 * GB)
    plan(K2_THINKING, studios(2), memory)
    with pytest.raises(PartitionError, match="does not fit"):
        plan(K2_THINKING, local_hostfile(2), memory)


def test_a_longer_context_needs_more_cache_bytes_but_no_more_shard_bytes() -> None:
    short, long = (
        plan_stages(FEW_EXPERTS, studios(2), [UNKNOWN] * 2, [32, 29], RunShape("bfloat16", context_tokens, 1, 2048))[0]
        for context_tokens in (32768, 65536)
    )
    assert short.shard_bytes == long.shard_bytes
    assert long.needed_bytes - short.needed_bytes == 32 * 32768 * 576 * 2  # layers, tokens, values, bytes


def test_in_float32_dense_weights_double_and_int4_experts_hold_scales_and_biases() -> None:
    in_bfloat16, in_float32 = (
        plan_stages(K2_THINKING, studios(1), [UNKNOWN], None, RunShape(dtype, 2048, 1, 128))[0].shard_bytes
        for dtype in ("bfloat16", "float32")
    )
    packed = sum(spec.num_bytes for spec in model_specs(K2_THINKING.config) if spec.name.endswith("weight_packed"))
    # bits per weight: 4, and a bfloat16 scale, or a float32 scale and bias, for each group of 32
    experts_in_bfloat16, experts_in_float32 = packed * 4.5 / 4, packed * 6 / 4
    assert in_float32 - experts_in_float32 == pytest.approx(2 * (in_bfloat16 - experts_in_bfloat16), rel=1e-3)


@pytest.mark.parametrize(
    ("dtype", "on_gpu", "chosen"),
    [
        (None, True, ("bfloat16", 4096)),
        (None, False, ("float32", 128)),
        ("float32", True, ("float32", 4096)),
        ("bfloat16", False, ("bfloat16", 128)),
    ],
)
def test_the_default_dtype_is_bfloat16_on_a_gpu_and_float32_on_a_cpu(
    dtype: str | None, on_gpu: bool, chosen: tuple[str, int]
) -> None:
    shape = choose_shape(FEW_EXPERTS.config, ClusterOptions(dtype=dtype), 1, on_gpu)
    assert (shape.dtype, shape.chunk_tokens) == chosen
    assert shape.on_gpu is on_gpu


@pytest.mark.slow
def test_spare_memory_of_a_gpu_enlarges_the_blocks_of_attention_within_what_is_planned() -> None:
    shape = choose_shape(K2_THINKING.config, ClusterOptions(context_tokens=131072), 1, True)
    block_bytes = {}
    for gb in (328, 330, 460):
        memory = HostMemory(working_set_bytes=gb * GB, ram_bytes=512 * GB)
        plans = plan_stages(K2_THINKING, studios(2), [memory] * 2, None, shape)
        check_fit(plans, [memory] * 2)
        block_bytes[gb] = plans[0].block_bytes
    assert 8 * 131072 * 2176 <= block_bytes[328] < block_bytes[330] < block_bytes[460] == 4 * 2**30


def test_the_context_defaults_to_32768_tokens_and_cannot_exceed_the_models() -> None:
    assert choose_shape(FEW_EXPERTS.config, ClusterOptions(), 1, True).context_tokens == 32768
    assert choose_shape(FEW_EXPERTS.config, ClusterOptions(context_tokens=262144), 1, True).context_tokens == 262144
    with pytest.raises(RequestError, match="--context 262145 is more than the 262144 positions"):
        choose_shape(FEW_EXPERTS.config, ClusterOptions(context_tokens=262145), 1, True)


@pytest.mark.slow
def test_dense_bits_reduce_held_and_read_bytes_but_not_working_bytes() -> None:
    plans = [
        plan_stages(K2_THINKING, studios(1), [UNKNOWN], None, RunShape("bfloat16", 2048, 1, 2048, bits))[0]
        for bits in (None, 8, 4)
    ]
    assert [round(plan.shard_bytes / 1e9, 1) for plan in plans] == [594.2, 584.5, 579.3]
    assert [round(plan.assignment.read_bytes / 1e9, 2) for plan in plans] == [32.99, 23.25, 18.06]
    assert len({plan.needed_bytes - plan.shard_bytes for plan in plans}) == 1


def test_only_4_bits_and_matrices_not_divisible_by_64_cause_warnings() -> None:
    assert quantization_warnings(K2_THINKING.config, None) == quantization_warnings(K2_THINKING.config, 8) == ()
    assert quantization_warnings(K2_THINKING.config, 4) == (
        "--dense-bits 4 may show in the answers: 8 stays closer to the checkpoint",
    )
    not_divisible = msgspec.structs.replace(K2_THINKING.config, qk_nope_head_dim=96, q_lora_rank=1520)
    assert quantization_warnings(not_divisible, 8) == (
        "not quantized in groups of 64 but held in groups of 32: kv_b_proj (96 inputs)",
        "not quantized in groups of 64 but held unquantized: q_b_proj (1520 inputs)",
    )


def test_layers_that_no_longer_fit_their_host_after_a_fault_are_an_error_that_names_the_host() -> None:
    before = plan(K2_THINKING, studios(2), STUDIO)
    check_fit(before, [STUDIO, STUDIO])
    with pytest.raises(
        StageStartError, match=r"stage 1 on mac-1 had \d+\.\d GB before the fault, .* 200\.0 GB"
    ) as caught:
        check_fit(before, [STUDIO, HostMemory(working_set_bytes=200 * GB, ram_bytes=512 * GB)])
    assert caught.value.rank == 1
