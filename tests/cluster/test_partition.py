"""Tests of the partition against brute force, and on Kimi K2 Thinking's own sizes."""

import functools
import itertools
import json
from collections.abc import Iterable

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

THINKING = ModelConfig.from_json(json.dumps(thinking_config_fields()).encode(), "config.json")

costs = st.builds(LayerCost, st.integers(0, 20), st.integers(0, 20))
models = st.builds(ModelCosts, embedding=costs, layers=st.lists(costs, min_size=1, max_size=8).map(tuple), head=costs)
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
def thinking_costs(context_tokens: int = 0) -> ModelCosts:
    """Return the costs of K2 Thinking in bfloat16, with the cache of one slot."""
    cache_bytes = layer_cache_bytes(THINKING, 1, context_tokens, 2)
    layers = tuple(
        LayerCost(held_bytes(layer_specs(THINKING, layer)) + cache_bytes, layer_read_bytes_per_token(THINKING, layer))
        for layer in range(61)
    )
    return ModelCosts(
        embedding=LayerCost(held_bytes(embedding_specs(THINKING)), embedding_read_bytes_per_token(THINKING)),
        layers=layers,
        head=LayerCost(held_bytes(head_specs(THINKING)), held_bytes(head_specs(THINKING))),
    )


def macs(*memory_gb: float, gb_per_s: Iterable[float | None] = itertools.repeat(None)) -> list[HostCapacity]:
    return [
        HostCapacity(name=f"mac-{rank}", memory_bytes=int(gb * GB), gb_per_s=speed)
        for rank, (gb, speed) in enumerate(zip(memory_gb, gb_per_s, strict=False))
    ]


def layers_of(assignments: tuple[StageAssignment, ...]) -> list[int]:
    """Return the layers of all stages, in order."""
    return [layer for assignment in assignments for layer in range(assignment.first_layer, assignment.end_layer)]


def layer_counts(assignments: tuple[StageAssignment, ...]) -> list[int]:
    return [assignment.num_layers for assignment in assignments]


def every_split(num_layers: int, num_hosts: int) -> list[tuple[int, ...]]:
    """Return the layer counts of each possible split."""
    splits = []
    for cuts in itertools.combinations(range(1, num_layers), num_hosts - 1):
        boundaries = itertools.pairwise((0, *cuts, num_layers))
        splits.append(tuple(end - first for first, end in boundaries))
    return splits


def slowest_stage_s(assignments: tuple[StageAssignment, ...], hosts: list[HostCapacity]) -> float:
    """Return the seconds per token of the slowest stage."""
    slowest_known = min((host.gb_per_s for host in hosts if host.gb_per_s), default=1.0)
    return max(
        assignment.read_bytes / (1e9 * (host.gb_per_s or slowest_known))
        for assignment, host in zip(assignments, hosts, strict=True)
    )


@given(model=models, hosts=hosts_of_a_cluster)
def test_the_chosen_split_has_the_fastest_slowest_stage_of_all_that_fit(
    model: ModelCosts, hosts: list[HostCapacity]
) -> None:
    fitting = []
    for counts in every_split(len(model.layers), len(hosts)):
        try:
            fitting.append(divide_as_requested(model, hosts, counts))
        except PartitionError:
            continue
    if not fitting:
        with pytest.raises(PartitionError):
            divide_layers(model, hosts)
        return
    assignments = divide_layers(model, hosts)
    assert assignments in fitting
    assert slowest_stage_s(assignments, hosts) == min(slowest_stage_s(other, hosts) for other in fitting)


@given(model=models, hosts=hosts_of_a_cluster)
def test_each_layer_is_assigned_exactly_once_within_host_memory(model: ModelCosts, hosts: list[HostCapacity]) -> None:
    try:
        assignments = divide_layers(model, hosts)
    except PartitionError:
        return
    assert layers_of(assignments) == list(range(len(model.layers)))
    for assignment, host in zip(assignments, hosts, strict=True):
        assert assignment.num_layers >= 1
        assert host.memory_bytes is None or assignment.held_bytes <= host.memory_bytes
    total = model.shard(0, len(model.layers))
    assert sum(assignment.held_bytes for assignment in assignments) == total.held_bytes
    assert sum(assignment.read_bytes for assignment in assignments) == total.read_bytes


def test_kimi_k2_thinking_on_two_equal_hosts_is_32_and_29_layers() -> None:
    assignments = divide_layers(thinking_costs(), macs(480, 480))
    assert layer_counts(assignments) == [32, 29]
    assert sum(assignment.held_bytes for assignment in assignments) == 594_205_351_936


@pytest.mark.parametrize("num_hosts", range(1, 17))
def test_all_61_layers_are_assigned_exactly_once_for_any_number_of_hosts(num_hosts: int) -> None:
    assignments = divide_layers(thinking_costs(), macs(*[600] * num_hosts))
    assert layers_of(assignments) == list(range(61))
    assert len(assignments) == num_hosts


def test_layer_counts_of_the_middle_stages_differ_by_at_most_one() -> None:
    counts = layer_counts(divide_layers(thinking_costs(), macs(*[600] * 16)))
    assert counts[-1] == 1  # the last stage also reads the whole head
    assert max(counts[1:-1]) - min(counts[1:-1]) <= 1


def test_a_host_with_less_memory_gets_fewer_layers() -> None:
    assert layer_counts(divide_layers(thinking_costs(), macs(480, 200))) == [41, 20]


def test_a_host_with_twice_the_bandwidth_reads_about_twice_as_much() -> None:
    fast, slow = divide_layers(thinking_costs(), macs(600, 600, gb_per_s=(800.0, 400.0)))
    assert fast.read_bytes / slow.read_bytes == pytest.approx(2, rel=0.1)


def test_held_bytes_include_the_cache() -> None:
    without_cache, with_cache = (
        sum(assignment.held_bytes for assignment in divide_layers(thinking_costs(context_tokens), macs(480, 480)))
        for context_tokens in (0, 32_768)
    )
    assert with_cache - without_cache == 32_768 * 70_272  # bytes per token, as published


def test_a_model_larger_than_the_hosts_memory_is_refused_with_the_sizes() -> None:
    reason = r"weights and cache need 594\.2 GB, and the hosts can hold 400\.0 GB \(mac-0 200\.0 GB, mac-1 200\.0 GB\)"
    with pytest.raises(PartitionError, match=reason):
        divide_layers(thinking_costs(), macs(200, 200))


def test_a_model_that_fits_only_with_split_layers_is_refused_with_the_layer_size() -> None:
    with pytest.raises(PartitionError, match=r"does not fit in whole layers of up to 9\.8 GB"):
        divide_layers(thinking_costs(), macs(3, 600))


@follows_advice(
    "there are 62 hosts and the model has 61 layers: use at most 61 hosts",
)
def test_more_hosts_than_layers_are_refused() -> None:
    with pytest.raises(PartitionError, match="62 hosts and the model has 61 layers: use at most 61 hosts"):
        divide_layers(thinking_costs(), macs(*[600] * 62))


def test_a_host_with_unknown_memory_has_no_limit() -> None:
    hosts = [HostCapacity(name=name, memory_bytes=None) for name in ("mac-1", "mac-2")]
    assert layer_counts(divide_layers(thinking_costs(), hosts)) == [32, 29]


def test_an_explicit_split_is_used() -> None:
    assignments = divide_as_requested(thinking_costs(), macs(480, 480), (31, 30))
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
        divide_as_requested(thinking_costs(), macs(480, 480), split)


def test_the_memory_of_a_host_is_the_smaller_of_the_drivers_and_the_hostfiles_limit() -> None:
    assert memory_bound_bytes(500, 400 * GB, 512 * GB) == 400 * GB
    assert memory_bound_bytes(300, 400 * GB, 512 * GB) == 300 * GB
    assert memory_bound_bytes(None, 400 * GB, 512 * GB) == 400 * GB
    assert memory_bound_bytes(None, None, 10 * GB) == 8 * GB
    assert memory_bound_bytes(16, None, None) == 16 * GB
    assert memory_bound_bytes(None, None, None) is None
    assert memory_bound_bytes(300, 400 * GB, 512 * GB, other_bytes=50 * GB) == 300 * GB
    assert memory_bound_bytes(None, 400 * GB, 512 * GB, other_bytes=150 * GB) == 250 * GB
    assert memory_bound_bytes(None, None, 10 * GB, other_bytes=9 * GB) == 0


def test_the_cache_bytes_per_token_equal_the_published_size() -> None:
    assert 61 * layer_cache_bytes(THINKING, 1, 1, 2) == 70_272
    assert 61 * layer_cache_bytes(THINKING, 2, 32_768, 2) == 2 * 32_768 * 70_272


def test_working_bytes_are_the_larger_of_loading_and_computing() -> None:
    layer_bytes = held_bytes(layer_specs(THINKING, 1))

    def needed(chunk_tokens: int, largest_part_bytes: int, *, on_gpu: bool) -> int:
        block_bytes = attention_block_bytes(THINKING, 32768, 2, on_gpu=on_gpu)
        return working_bytes(THINKING, chunk_tokens, 2, largest_part_bytes, block_bytes=block_bytes, on_gpu=on_gpu)

    assert needed(2048, layer_bytes, on_gpu=False) == needed(2048, layer_bytes, on_gpu=True) == layer_bytes
    assert 2**29 < needed(2048, 0, on_gpu=False) < 2 * GB
    assert 5 * GB < needed(4096, 0, on_gpu=True) < 8 * GB
    assert needed(4096, 0, on_gpu=False) > needed(2048, 0, on_gpu=False)


def test_a_block_of_attention_is_fixed_on_a_cpu_and_grows_with_context_and_spare_memory_on_a_gpu() -> None:
    on_cpu = {attention_block_bytes(THINKING, tokens, 4, on_gpu=False) for tokens in (2048, 131072)}
    assert on_cpu == {128 * 2**20}
    sizes = [attention_block_bytes(THINKING, tokens, 2, on_gpu=True) for tokens in (2048, 32768, 131072, 262144)]
    assert sizes == [128 * 2**20, 8 * 32768 * 2176, 8 * 131072 * 2176, 8 * 262144 * 2176]
    assert [added_block_bytes(sizes[1], gb * GB) for gb in (0, 1, 100)] == [0, GB // 4, 4 * 2**30 - sizes[1]]
    assert added_block_bytes(sizes[3], 100 * GB) == 0
