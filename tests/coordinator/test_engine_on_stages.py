"""Tests of requests over real stages on this machine: tokens, cancelling, and errors of lost or silent stages."""

import itertools
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import hypothesis
import pytest

from mlx_k2.coordinator.handle import Finished, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.coordinator.pipeline import StepTimeout
from mlx_k2.errors import ClusterError, StageFault, StageSilent
from mlx_k2.scheduling.request import FinishReason, Priority, Request
from tests.local_cluster import (
    NUM_LAYERS,
    Cluster,
    local_cluster,
    local_host,
    marked_host,
    request,
    rest_of,
    stage_process,
    together,
    write_model,
)

LONG = request(150, 30, seed=5)
GREEDY = request(70, 30, temperature=0)
SHORT = request(3, 60, seed=7)
ClusterOf = Callable[[int], Cluster]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def cluster_of(model: Path) -> Iterator[ClusterOf]:
    """Yield a function from a number of stages to a cluster. It starts each cluster at the first call."""
    with ExitStack() as stack:
        yield cache(lambda num_stages: stack.enter_context(local_cluster(model, [local_host()] * num_stages)))


@pytest.mark.slow
def test_sampled_and_greedy_tokens_are_the_same_through_1_2_and_3_stages(cluster_of: ClusterOf) -> None:
    one, two, three = (cluster_of(num_stages).tokens(LONG, GREEDY) for num_stages in (1, 2, 3))
    assert one == two == three


def test_concurrent_requests_get_the_same_tokens_as_when_run_alone(cluster_of: ClusterOf) -> None:
    cluster = cluster_of(2)
    alone = {each: cluster.tokens(each)[each] for each in (LONG, GREEDY, SHORT)}
    assert cluster.tokens(LONG, SHORT, GREEDY) == alone
    assert cluster.tokens(GREEDY, LONG, SHORT) == alone


def test_more_requests_than_slots_all_finish(cluster_of: ClusterOf) -> None:
    requests = [request(length, 5) for length in (4, 40, 8, 90, 2, 16)]
    assert [len(tokens) for tokens in cluster_of(2).tokens(*requests).values()] == [5] * 6


def test_another_seed_samples_other_tokens(cluster_of: ClusterOf) -> None:
    first, second, again = (request(20, 20, seed=seed) for seed in (1, 2, 1))
    tokens = [cluster_of(2).tokens(each)[each] for each in (first, second, again)]
    assert tokens[0] == tokens[2] != tokens[1]


def test_cancelled_requests_end_at_once_and_do_not_change_later_tokens(cluster_of: ClusterOf) -> None:
    cluster = cluster_of(2)
    undisturbed = cluster.tokens(SHORT)
    first, second = (cluster.engine.submit(each) for each in (request(40, 1000), LONG))
    assert any(isinstance(event, Token) for event in first.events())
    first.cancel()
    second.cancel()
    for handle in (first, second):
        token_ids, end = rest_of(handle)
        assert (token_ids, end.reason) == ([], FinishReason.CANCELLED)
    assert cluster.tokens(SHORT) == undisturbed


def test_a_timed_out_request_keeps_its_tokens_and_does_not_change_other_requests(cluster_of: ClusterOf) -> None:
    cluster = cluster_of(2)
    alone = cluster.tokens(SHORT)[SHORT]
    after_1_s, at_once = (replace(request(40, 2000), timeout_s=timeout_s) for timeout_s in (1.0, 1e-6))
    handles = cluster.engine.submit_all([Submission(each) for each in (after_1_s, SHORT, at_once)])
    token_ids, ends = zip(*(rest_of(handle) for handle in handles), strict=True)
    assert 0 < len(token_ids[0]) < 2000
    assert token_ids[1:] == (alone, [])
    assert [end.reason for end in ends] == [FinishReason.TIMEOUT, FinishReason.LENGTH, FinishReason.TIMEOUT]


NUM_SEEDS = 20 if hypothesis.settings.get_current_profile_name() == "long" else 1
POOL = [
    replace(request(length, max_tokens, seed=seed), priority=priority)
    for seed, (length, max_tokens, priority) in enumerate(
        itertools.product((1, 2, 5, 9, 33, 40, 71, 100, 130, 200), (1, 6, 25), Priority)
    )
]


@pytest.fixture(scope="module")
def alone(cluster_of: ClusterOf) -> dict[Request, list[int]]:
    """Return the tokens of each request of POOL, run alone."""
    return {each: cluster_of(2).tokens(each)[each] for each in POOL}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_requests_of_two_threads_at_random_times_get_the_tokens_that_they_get_alone(
    cluster_of: ClusterOf, alone: dict[Request, list[int]], seed: int
) -> None:
    """Submit 50 requests, 25 on each of two threads, and cancel 20 of them."""
    rng = random.Random(seed)
    chosen = rng.sample(POOL, 50)
    engine = cluster_of(2).engine
    results: dict[Request, tuple[list[int], Finished]] = {}

    def submit(requests: list[Request], delays_s: list[float], cancelled: set[int]) -> None:
        handles = []
        for index, (each, delay_s) in enumerate(zip(requests, delays_s, strict=True)):
            threading.Event().wait(delay_s)
            handles.append(engine.submit(each))
            if index in cancelled:  # half of the time any earlier request, else this one
                handles[rng.randrange(len(handles)) if index % 2 else -1].cancel()
        results.update({handle.request: rest_of(handle) for handle in handles})

    threads = []
    for half in (chosen[:25], chosen[25:]):
        delays_s = [rng.expovariate(50) for _ in half]
        threads.append(threading.Thread(target=submit, args=[half, delays_s, set(rng.sample(range(25), 10))]))
        threads[-1].start()
    for thread in threads:
        thread.join(120)
    assert len(results) == 50
    num_complete = 0
    for each, (token_ids, end) in results.items():
        if end.reason is FinishReason.CANCELLED:
            assert token_ids == alone[each][: len(token_ids)]
        else:
            assert token_ids == alone[each]
            num_complete += 1
    assert num_complete >= 30


def test_every_stage_reports_its_steps_and_busy_time(cluster_of: ClusterOf) -> None:
    stage_use = cluster_of(2).engine.use
    num_before = max(use.steps_done for use in stage_use)
    cluster_of(2).tokens(request(4, 10))
    while {use.steps_done for use in stage_use} != {num_before + 10}:
        threading.Event().wait(0.001)
    assert all(use.busy_s > 0 for use in stage_use)


@pytest.mark.parametrize("num_stages", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 3, 7))])
def test_the_stages_load_each_tensor_once_with_embedding_first_and_head_last(
    cluster_of: ClusterOf, num_stages: int
) -> None:
    cluster = cluster_of(num_stages)
    names = cluster.loaded.by_rank
    assert sorted(names) == list(range(num_stages))
    not_loaded = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(NUM_LAYERS)}
    assert Counter(itertools.chain(*names.values())) == Counter(
        cluster.deployment.model.index.weight_map.keys() - not_loaded
    )
    for rank, loaded in names.items():
        assert ("model.embed_tokens.weight" in loaded) == (rank == 0)
        assert ("model.norm.weight" in loaded) == ("lm_head.weight" in loaded) == (rank == num_stages - 1)
    assert [loaded.held_bytes for loaded in cluster.deployment.loaded] == [
        plan.shard_bytes for plan in cluster.deployment.plans
    ]


def error_after(
    model: Path,
    folder: Path,
    disturb: Callable[[], None],
    step_timeout: StepTimeout | None = None,
    stall_timeout_s: float = 8.0,
) -> ClusterError:
    """Return the error of a run over two marked stages in which ``disturb`` is called after the sixth token."""
    hosts = [marked_host(folder, rank, sys.executable) for rank in range(2)]
    with local_cluster(model, hosts, step_timeout, stall_timeout_s) as cluster, pytest.raises(ClusterError) as caught:
        for count, _ in enumerate(together(cluster.engine, request(8, 2000))):
            if count == 5:
                disturb()
    return caught.value


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_fault_of_a_killed_stage_names_the_stage_and_its_host(model: Path, tmp_path: Path, rank: int) -> None:
    error = error_after(model, tmp_path, lambda: stage_process(rank).kill())
    assert isinstance(error, StageFault)
    assert re.match(
        rf"stage {rank} on this machine \((receiving|computing|sending|waiting) .* step \d+\) ended with signal 9",
        str(error),
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_error_for_a_suspended_stage_names_host_step_and_phase(model: Path, tmp_path: Path, rank: int) -> None:
    error = error_after(model, tmp_path, lambda: stage_process(rank).suspend(), stall_timeout_s=1.0)
    assert isinstance(error, StageSilent)
    assert re.match(rf"stage {rank} on this machine \(.*\) is stopped: its process was suspended \d+ s ago", str(error))


@pytest.mark.slow
def test_a_step_timeout_names_the_late_stage_and_lists_every_stage_status(model: Path, tmp_path: Path) -> None:
    error = error_after(model, tmp_path, lambda: stage_process(1).suspend(), StepTimeout(1.0, 0.0))
    assert isinstance(error, StageSilent)
    assert re.match(
        r"stage 1 on this machine \(.+ for \d+ s\) has not finished step \d+ \(1 tokens\) after \d+ s; "
        r"the stages: stage 0 on this machine \(waiting for the next step after step \d+ for \d+ s\), "
        r"stage 1 on this machine \(.+\)",
        str(error),
    )
