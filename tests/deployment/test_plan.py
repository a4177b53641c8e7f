"""Tests of plan_stages and choose_shape: each stage's layers, bytes and files. No process and no tensor."""

import json
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest

from mlx_k2.cluster.hostfile import Backend, Host, Hostfile, local_hostfile
from mlx_k2.cluster.memory import LARGEST_BLOCK_BYTES, attention_block_bytes
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
UNKNOWN_MEMORY = HostMemory(working_set_bytes=None, ram_bytes=None)


def k2_thinking(num_experts: int) -> ModelDescription:
    """Return Kimi K2 Thinking with ``num_experts`` experts, a file for each layer, and one for embedding and head."""
    fields = thinking_config_fields(n_routed_experts=num_experts)
    config = ModelConfig.from_json(json.dumps(fields).encode(), "config.json")
    files = {spec.name: f"layer-{layer}.safetensors" for layer in range(61) for spec in layer_specs(config, layer)}
    weight_map = {spec.name: files.get(spec.name, "ends.safetensors") for spec in model_specs(config)}
    return ModelDescription({}, config, CheckpointIndex(weight_map, "the index"), "digest", None)


K2_THINKING = k2_thinking(384)
SMALL_K2 = k2_thinking(8)


def studios(num_hosts: int) -> Hostfile:
    """Return a hostfile of the hosts mac-0, mac-1 and so on."""
    hosts = tuple(Host(ssh=f"mac-{rank}", ips=("10.0.0.1",)) for rank in range(num_hosts))
    return Hostfile(hosts=hosts, backend=Backend.RING)


def plan(
    model: ModelDescription,
    hostfile: Hostfile,
    memory: HostMemory = UNKNOWN_MEMORY,
    split: Sequence[int] | None = None,
    shape: RunShape = SHAPE,
) -> tuple[StagePlan, ...]:
    """Plan the stages of hosts that all have the same memory."""
    return plan_stages(model, hostfile, [memory] * len(hostfile.hosts), split, shape)


def test_two_equal_macs_run_32_and_29_layers_of_k2_thinking() -> None:
    first, last = plan(K2_THINKING, studios(2), STUDIO)
    assert (first.assignment.num_layers, last.assignment.num_layers) == (32, 29)
    assert (first.host.ssh, last.host.ssh) == ("mac-0", "mac-1")


@pytest.mark.parametrize("num_hosts", [1, 2, 5, 16])
def test_each_layer_is_on_one_stage_and_the_shards_sum_to_the_model(num_hosts: int) -> None:
    plans = plan(SMALL_K2, studios(num_hosts))
    assert [stage.rank for stage in plans] == list(range(num_hosts))
    assert [layer for stage in plans for layer in layers_of(stage)] == list(range(61))
    assert sum(stage.shard_bytes for stage in plans) == held_bytes(model_specs(SMALL_K2.config), compute_bytes=2)


def layers_of(stage: StagePlan) -> range:
    return range(stage.assignment.first_layer, stage.assignment.end_layer)


def test_a_stage_has_the_files_of_its_layers_and_at_both_ends_the_file_of_embedding_and_head() -> None:
    first, middle, last = plan(SMALL_K2, studios(3))
    for stage in (first, middle, last):
        layer_files = {f"layer-{layer}.safetensors" for layer in layers_of(stage)}
        assert set(stage.files) - {"ends.safetensors"} == layer_files
        assert ("ends.safetensors" in stage.files) == (stage is not middle)


def test_a_plan_follows_a_requested_split() -> None:
    assert [stage.assignment.num_layers for stage in plan(SMALL_K2, studios(2), STUDIO, [31, 30])] == [31, 30]


@follows_advice(
    "--split 50,11 does not fit: stage 0 needs 400 GB and mac-0 can hold 4 GB: give it fewer layers",
)
def test_the_error_about_a_model_that_does_not_fit_names_the_sizes() -> None:
    with pytest.raises(
        PartitionError, match=r"need 59\d\.\d GB, and the hosts can hold 45\d\.\d GB \(mac-0 45\d\.\d GB\)"
    ):
        plan(K2_THINKING, studios(1), STUDIO)
    with pytest.raises(PartitionError, match=r"--split 50,11 does not fit: stage 0 needs 4\d\d\.\d GB and mac-0"):
        plan(K2_THINKING, studios(2), STUDIO, [50, 11])


def test_stages_on_one_machine_divide_its_memory() -> None:
    memory = HostMemory(working_set_bytes=None, ram_bytes=600 * GB)
    plan(K2_THINKING, studios(2), memory)  # fits
    with pytest.raises(PartitionError, match="does not fit"):
        plan(K2_THINKING, local_hostfile(2), memory)


def test_a_longer_context_needs_more_cache_bytes_but_no_more_shard_bytes() -> None:
    short, long = (
        plan(SMALL_K2, studios(2), split=[32, 29], shape=replace(SHAPE, context_tokens=context_tokens))[0]
        for context_tokens in (32768, 65536)
    )
    assert short.shard_bytes == long.shard_bytes
    assert long.needed_bytes - short.needed_bytes == 32 * 32768 * 576 * 2  # layers, positions, values, bytes of each


def test_in_float32_dense_weights_double_and_int4_experts_hold_scales_and_biases() -> None:
    bfloat16_bytes, float32_bytes = (
        plan(K2_THINKING, studios(1), shape=replace(SHAPE, dtype=dtype))[0].shard_bytes
        for dtype in ("bfloat16", "float32")
    )
    int4_bytes = sum(spec.num_bytes for spec in model_specs(K2_THINKING.config) if spec.name.endswith("weight_packed"))
    # a group of 32 codes of 4 bits has one scale of 16 bits in bfloat16, a scale and a bias of 32 bits in float32
    bfloat16_expert_bytes, float32_expert_bytes = int4_bytes * 4.5 / 4, int4_bytes * 6 / 4
    dense_bytes = bfloat16_bytes - bfloat16_expert_bytes
    assert float32_bytes - float32_expert_bytes == pytest.approx(2 * dense_bytes, rel=1e-3)


@pytest.mark.parametrize(
    ("dtype", "on_gpu", "expected"),
    [
        (None, True, ("bfloat16", 4096)),
        (None, False, ("float32", 128)),
        ("float32", True, ("float32", 4096)),
        ("bfloat16", False, ("bfloat16", 128)),
    ],
)
def test_the_defaults_are_bfloat16_and_chunks_of_4096_on_a_gpu_and_float32_and_chunks_of_128_on_a_cpu(
    dtype: str | None, on_gpu: bool, expected: tuple[str, int]
) -> None:
    shape = choose_shape(SMALL_K2.config, ClusterOptions(dtype=dtype), num_slots=1, all_on_gpu=on_gpu)
    assert (shape.dtype, shape.chunk_tokens) == expected
    assert shape.on_gpu is on_gpu


@pytest.mark.slow
def test_unused_memory_of_a_gpu_enlarges_the_blocks_of_attention_and_the_plan_still_fits() -> None:
    shape = choose_shape(K2_THINKING.config, ClusterOptions(context_tokens=131072), num_slots=1, all_on_gpu=True)
    block_bytes = []
    for working_set_gb in (328, 330, 460):  # 328 and 330 GB leave stage 0 less than two of the largest blocks need
        memory = HostMemory(working_set_bytes=working_set_gb * GB, ram_bytes=512 * GB)
        plans = plan(K2_THINKING, studios(2), memory, shape=shape)
        check_fit(plans, [memory] * 2)
        block_bytes.append(plans[0].block_bytes)
    smallest, middle, largest = block_bytes
    minimum = attention_block_bytes(K2_THINKING.config, shape.context_tokens, compute_bytes=2, on_gpu=True)
    assert minimum <= smallest < middle < largest
    assert largest == LARGEST_BLOCK_BYTES


def test_the_context_defaults_to_32768_tokens_and_cannot_exceed_the_models() -> None:
    def context_of(options: ClusterOptions) -> int:
        return choose_shape(SMALL_K2.config, options, num_slots=1, all_on_gpu=True).context_tokens

    assert context_of(ClusterOptions()) == 32768
    assert context_of(ClusterOptions(context_tokens=262144)) == 262144
    with pytest.raises(RequestError, match="--context 262145 is more than the 262144 positions"):
        context_of(ClusterOptions(context_tokens=262145))


@pytest.mark.slow
def test_dense_bits_reduce_held_and_read_bytes_but_not_working_bytes() -> None:
    stages = [
        plan(K2_THINKING, studios(1), shape=replace(SHAPE, context_tokens=2048, dense_bits=dense_bits))[0]
        for dense_bits in (None, 8, 4)
    ]
    assert [round(stage.shard_bytes / GB, 1) for stage in stages] == [594.2, 584.5, 579.3]
    assert [round(stage.assignment.read_bytes / GB, 2) for stage in stages] == [32.99, 23.25, 18.06]
    assert len({stage.needed_bytes - stage.shard_bytes for stage in stages}) == 1


def test_4_bits_and_matrices_whose_inputs_are_not_divisible_by_64_cause_warnings() -> None:
    assert quantization_warnings(K2_THINKING.config, None) == quantization_warnings(K2_THINKING.config, 8) == ()
    assert quantization_warnings(K2_THINKING.config, 4) == (
        "--dense-bits 4 may show in the answers: 8 stays closer to the checkpoint",
    )
    # Of these numbers of inputs, only the first is divisible by 32.
    config = msgspec.structs.replace(K2_THINKING.config, qk_nope_head_dim=96, q_lora_rank=1520)
    assert quantization_warnings(config, 8) == (
        "not quantized in groups of 64 but held in groups of 32: kv_b_proj (96 inputs)",
        "not quantized in groups of 64 but held unquantized: q_b_proj (1520 inputs)",
    )


def test_the_error_about_layers_that_no_longer_fit_after_a_fault_names_their_host() -> None:
    plans = plan(K2_THINKING, studios(2), STUDIO)
    check_fit(plans, [STUDIO, STUDIO])
    pattern = r"stage 1 on mac-1 had \d+\.\d GB before the fault, .* 200\.0 GB"
    with pytest.raises(StageStartError, match=pattern) as caught:
        check_fit(plans, [STUDIO, HostMemory(working_set_bytes=200 * GB, ram_bytes=512 * GB)])
    assert caught.value.rank == 1
