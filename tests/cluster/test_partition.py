"""Tests of the partition against all possible ones, and with the sizes of Kimi K2 Thinking; tests of memory sizes."""

import functools
import itertools
import json
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.cluster.memory import (
    GB,
    added_block_bytes,
    attention_block_bytes,
    layer_cache_bytes,
    memory_bound_bytes,
    working_bytes,
)
from mlx_k2.cluster.partition import (
    HostCapacity,
    LayerCost,
    ModelCosts,
    StageAssignment,
    divide_as_requested,
    divide_layers,
)
from mlx_k2.config import ModelConfig
from mlx_k2.errors import PartitionError
from mlx_k2.weights.inventory import (
    embedding_read_bytes_per_token,
    embedding_specs,
    head_specs,
    held_bytes,
    layer_read_bytes_per_token,
    layer_specs,
)
from mlx_k2.weights.known_layout import thinking_config_fields
from tests.advice import follows_advice

NUM_LAYERS = 61
BFLOAT16_BYTES = 2
FLOAT32_BYTES = 4
K2_CACHE_BYTES_PER_TOKEN = NUM_LAYERS * 576 * BFLOAT16_BYTES
K2_THINKING = ModelConfig.from_json(json.dumps(thinking_config_fields()).encode(), "config.json")

layer_costs = st.builds(LayerCost, st.integers(0, 20), st.integers(0, 20))
models = st.builds(
    ModelCosts, embedding=layer_costs, layers=st.lists(layer_costs, min_size=1, max_size=8).map(tuple), head=layer_costs
)
hosts_of_a_cluster = st.lists(
    st.builds(
        HostCapacity,
        name=st.just("mac"),
        memory_bytes=st.none() | st.integers(0, 100),
        gb_per_s=st.none() | st.sampled_from([1.0, 2.0, 3.5]),
    ),
    min_size=1,
    max_size=4,
)


@functools.cache
def k2_costs(context_tokens: int = 0) -> ModelCosts:
    """Return the costs of Kimi K2 Thinking in bfloat16, with the cache of one slot of ``context_tokens``."""
    cache_bytes = k2_layer_cache_bytes(num_slots=1, context_tokens=context_tokens)
    weight_bytes = [held_bytes(layer_specs(K2_THINKING, layer)) for layer in range(NUM_LAYERS)]
    layers = tuple(
        LayerCost(held + cache_bytes, layer_read_bytes_per_token(K2_THINKING, layer))
        for layer, held in enumerate(weight_bytes)
    )
    head_bytes = held_bytes(head_specs(K2_THINKING))
    return ModelCosts(
        embedding=LayerCost(held_bytes(embedding_specs(K2_THINKING)), embedding_read_bytes_per_token(K2_THINKING)),
        layers=layers,
        head=LayerCost(held_bytes=head_bytes, read_bytes=head_bytes),  # each token reads the whole head
    )


def k2_layer_cache_bytes(num_slots: int, context_tokens: int) -> int:
    return layer_cache_bytes(K2_THINKING, num_slots, context_tokens, BFLOAT16_BYTES)


def macs(*memory_gb: float) -> list[HostCapacity]:
    """Return the hosts mac-0, mac-1 and so on, of unknown speed."""
    return [HostCapacity(name=f"mac-{rank}", memory_bytes=int(gb * GB)) for rank, gb in enumerate(memory_gb)]


def layer_counts(assignments: tuple[StageAssignment, ...]) -> list[int]:
    return [assignment.num_layers for assignment in assignments]


def assigned_layers(assignments: tuple[StageAssignment, ...]) -> list[int]:
    return [layer for assignment in assignments for layer in range(assignment.first_layer, assignment.end_layer)]


def all_splits(num_layers: int, num_hosts: int) -> Iterator[list[int]]:
    """Yield every division of the layers into one or more for each host, as numbers of layers."""
    for cuts in itertools.combinations(range(1, num_layers), num_hosts - 1):
        yield [end - start for start, end in itertools.pairwise((0, *cuts, num_layers))]


def slowest_stage_s(assignments: tuple[StageAssignment, ...], hosts: list[HostCapacity]) -> float:
    """Return the seconds in which the slowest stage reads its weights. Unknown speeds are as the lowest known one."""
    lowest_gb_per_s = min((host.gb_per_s for host in hosts if host.gb_per_s), default=1.0)
    return max(
        assignment.read_bytes / (1e9 * (host.gb_per_s or lowest_gb_per_s))
        for assignment, host in zip(assignments, hosts, strict=True)
    )


@given(model=models, hosts=hosts_of_a_cluster)
def test_no_split_that_fits_has_a_faster_slowest_stage_than_the_chosen_split(
    model: ModelCosts, hosts: list[HostCapacity]
) -> None:
    fitting = []
    for split in all_splits(len(model.layers), len(hosts)):
        with suppress(PartitionError):
            fitting.append(divide_as_requested(model, hosts, split))
    if not fitting:
        with pytest.raises(PartitionError):
            divide_layers(model, hosts)
        return
    assignments = divide_layers(model, hosts)
    assert assignments in fitting
    assert slowest_stage_s(assignments, hosts) == min(slowest_stage_s(other, hosts) for other in fitting)


@given(model=models, hosts=hosts_of_a_cluster)
def test_each_layer_is_assigned_exactly_once_within_the_memory_of_its_host(
    model: ModelCosts, hosts: list[HostCapacity]
) -> None:
    try:
        assignments = divide_layers(model, hosts)
    except PartitionError:
        return
    assert assigned_layers(assignments) == list(range(len(model.layers)))
    for assignment, host in zip(assignments, hosts, strict=True):
        assert assignment.num_layers >= 1
        assert host.memory_bytes is None or assignment.held_bytes <= host.memory_bytes
    all_layers = model.shard(0, len(model.layers))
    assert sum(assignment.held_bytes for assignment in assignments) == all_layers.held_bytes
    assert sum(assignment.read_bytes for assignment in assignments) == all_layers.read_bytes


def test_on_two_equal_hosts_kimi_k2_thinking_is_divided_into_32_and_29_layers() -> None:
    assignments = divide_layers(k2_costs(), macs(480, 480))
    assert layer_counts(assignments) == [32, 29]
    assert sum(assignment.held_bytes for assignment in assignments) == 594_205_351_936  # the whole checkpoint


@pytest.mark.parametrize("num_hosts", range(1, 17))
def test_all_61_layers_are_assigned_exactly_once_to_1_to_16_hosts(num_hosts: int) -> None:
    assignments = divide_layers(k2_costs(), macs(*[600] * num_hosts))
    assert assigned_layers(assignments) == list(range(NUM_LAYERS))
    assert len(assignments) == num_hosts


def test_layer_counts_of_the_middle_stages_differ_by_at_most_one() -> None:
    counts = layer_counts(divide_layers(k2_costs(), macs(*[600] * 16)))
    assert counts[-1] == 1  # the last stage also reads the whole head
    assert max(counts[1:-1]) - min(counts[1:-1]) <= 1


def test_a_host_with_less_memory_gets_fewer_layers() -> None:
    assert layer_counts(divide_layers(k2_costs(), macs(480, 200))) == [41, 20]


def test_a_host_with_twice_the_bandwidth_reads_about_twice_as_much() -> None:
    hosts = [HostCapacity(name="mac", memory_bytes=600 * GB, gb_per_s=gb_per_s) for gb_per_s in (800.0, 400.0)]
    fast, slow = divide_layers(k2_costs(), hosts)
    assert fast.read_bytes / slow.read_bytes == pytest.approx(2, rel=0.1)


def test_held_bytes_include_the_cache() -> None:
    without_cache, with_cache = (
        sum(assignment.held_bytes for assignment in divide_layers(k2_costs(context_tokens), macs(480, 480)))
        for context_tokens in (0, 32_768)
    )
    assert with_cache - without_cache == 32_768 * K2_CACHE_BYTES_PER_TOKEN


def test_a_model_larger_than_the_hosts_memory_is_refused_with_the_sizes() -> None:
    reason = r"weights and cache need 594\.2 GB, and the hosts can hold 400\.0 GB \(mac-0 200\.0 GB, mac-1 200\.0 GB\)"
    with pytest.raises(PartitionError, match=reason):
        divide_layers(k2_costs(), macs(200, 200))


def test_a_model_that_fits_only_with_split_layers_is_refused_with_the_layer_size() -> None:
    with pytest.raises(PartitionError, match=r"does not fit in whole layers of up to 9\.8 GB"):
        divide_layers(k2_costs(), macs(3, 600))


@follows_advice(
    "there are 62 hosts and the model has 61 layers: use at most 61 hosts",
)
def test_more_hosts_than_layers_are_refused() -> None:
    with pytest.raises(PartitionError, match="62 hosts and the model has 61 layers: use at most 61 hosts"):
        divide_layers(k2_costs(), macs(*[600] * 62))


def test_a_host_with_unknown_memory_has_no_limit() -> None:
    hosts = [HostCapacity(name=name, memory_bytes=None) for name in ("mac-1", "mac-2")]
    assert layer_counts(divide_layers(k2_costs(), hosts)) == [32, 29]


def test_a_requested_split_is_used() -> None:
    assignments = divide_as_requested(k2_costs(), macs(480, 480), (31, 30))
    assert layer_counts(assignments) == [31, 30]


@pytest.mark.parametrize(
    ("split", "reason"),
    [
        ((31, 30, 1), "--split 31,30,1 names 3 stages, and there are 2 hosts"),
        ((61,), "--split 61 names 1 stages, and there are 2 hosts"),
        ((31, 31), "--split 31,31 assigns 62 layers: it must assign 61"),
        ((50, 11), r"stage 0 needs 484\.0 GB and mac-0 can hold 480\.0 GB: give it fewer layers$"),
    ],
)
def test_an_impossible_split_is_refused(split: tuple[int, ...], reason: str) -> None:
    with pytest.raises(PartitionError, match=reason):
        divide_as_requested(k2_costs(), macs(480, 480), split)


def test_the_memory_limit_is_the_hostfiles_if_it_is_below_the_gpu_drivers_or_80_percent_of_the_ram() -> None:
    m3_ultra = functools.partial(memory_bound_bytes, working_set_bytes=400 * GB, ram_bytes=512 * GB)
    assert m3_ultra(memory_gb=500) == 400 * GB
    assert m3_ultra(memory_gb=300) == 300 * GB
    assert m3_ultra(memory_gb=None) == 400 * GB
    assert m3_ultra(memory_gb=300, other_bytes=50 * GB) == 300 * GB
    assert m3_ultra(memory_gb=None, other_bytes=150 * GB) == 250 * GB
    without_gpu = functools.partial(memory_bound_bytes, working_set_bytes=None, ram_bytes=10 * GB)
    assert without_gpu(memory_gb=None) == 8 * GB
    assert without_gpu(memory_gb=None, other_bytes=9 * GB) == 0
    unknown_host = functools.partial(memory_bound_bytes, working_set_bytes=None, ram_bytes=None)
    assert unknown_host(memory_gb=16) == 16 * GB
    assert unknown_host(memory_gb=None) is None


def test_the_cache_of_k2_has_576_values_for_each_layer_and_token() -> None:
    assert NUM_LAYERS * k2_layer_cache_bytes(num_slots=1, context_tokens=1) == K2_CACHE_BYTES_PER_TOKEN
    assert (
        NUM_LAYERS * k2_layer_cache_bytes(num_slots=2, context_tokens=32_768) == 2 * 32_768 * K2_CACHE_BYTES_PER_TOKEN
    )


def test_working_bytes_are_the_larger_of_loading_and_computing() -> None:
    layer_bytes = held_bytes(layer_specs(K2_THINKING, 1))  # 9.8 GB, more than a chunk needs

    def needed_bytes(chunk_tokens: int, largest_part_bytes: int, *, on_gpu: bool) -> int:
        return working_bytes(
            K2_THINKING,
            chunk_tokens,
            BFLOAT16_BYTES,
            largest_part_bytes,
            block_bytes=attention_block_bytes(K2_THINKING, 32_768, BFLOAT16_BYTES, on_gpu=on_gpu),
            on_gpu=on_gpu,
        )

    computing_bytes = functools.partial(needed_bytes, largest_part_bytes=0)
    assert needed_bytes(2048, layer_bytes, on_gpu=False) == needed_bytes(2048, layer_bytes, on_gpu=True) == layer_bytes
    assert 2**29 < computing_bytes(2048, on_gpu=False) < 2 * GB
    assert 5 * GB < computing_bytes(4096, on_gpu=True) < 8 * GB
    assert computing_bytes(4096, on_gpu=False) > computing_bytes(2048, on_gpu=False)


def test_a_block_of_attention_is_fixed_on_a_cpu_and_grows_with_context_and_spare_memory_on_a_gpu() -> None:
    contexts = (32_768, 131_072, 262_144)
    cpu_sizes = {attention_block_bytes(K2_THINKING, tokens, FLOAT32_BYTES, on_gpu=False) for tokens in contexts}
    assert cpu_sizes == {128 * 2**20}
    assert attention_block_bytes(K2_THINKING, 2048, BFLOAT16_BYTES, on_gpu=True) == 128 * 2**20
    sizes = [attention_block_bytes(K2_THINKING, tokens, BFLOAT16_BYTES, on_gpu=True) for tokens in contexts]
    values_per_key = 2 * 256 + 3 * 192  # scores of 256 queries before and after softmax, and keys and values
    assert sizes == [8 * tokens * values_per_key * BFLOAT16_BYTES for tokens in contexts]  # for 8 heads
    limit = 4 * 2**30
    # two blocks are in memory at a time, and half of the spare memory stays free: a block grows by a quarter of it
    assert [added_block_bytes(sizes[0], gb * GB) for gb in (0, 1, 100)] == [0, GB // 4, limit - sizes[0]]
    assert sizes[2] > limit
    assert added_block_bytes(sizes[2], 100 * GB) == 0
