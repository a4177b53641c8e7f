"""Tests of requests over real stages on this machine: tokens, cancellation, errors of killed and suspended stages."""

import itertools
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import hypothesis
import pytest

from mlx_k2.coordinator.handle import Handle, Token
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

LONG_PROMPT = request(150, 30, seed=5)
GREEDY = request(70, 30, temperature=0)
SHORT_PROMPT = request(3, 60, seed=7)
ClusterOf = Callable[[int], Cluster]
PHASE_AND_STEP = r"(receiving|computing|sending|waiting) .* step \d+"
"""A pattern of a stage's status while requests run."""


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
    one, two, three = (cluster_of(num_stages).tokens(LONG_PROMPT, GREEDY) for num_stages in (1, 2, 3))
    assert one == two == three


def test_concurrent_requests_get_the_same_tokens_as_when_run_alone(cluster_of: ClusterOf) -> None:
    cluster = cluster_of(2)
    tokens_alone = cluster.tokens(LONG_PROMPT) | cluster.tokens(GREEDY) | cluster.tokens(SHORT_PROMPT)
    assert cluster.tokens(LONG_PROMPT, SHORT_PROMPT, GREEDY) == tokens_alone
    assert cluster.tokens(GREEDY, LONG_PROMPT, SHORT_PROMPT) == tokens_alone


def test_more_requests_than_slots_all_finish(cluster_of: ClusterOf) -> None:
    cluster = cluster_of(2)
    requests = [request(num_prompt, max_tokens=5) for num_prompt in (4, 40, 8, 90, 2, 16)]
    assert len(requests) > cluster.deployment.shape.num_slots
    assert [len(tokens) for tokens in cluster.tokens(*requests).values()] == [5] * len(requests)


def test_another_seed_samples_other_tokens_and_the_same_seed_the_same(cluster_of: ClusterOf) -> None:
    first, other, again = (cluster_of(2).tokens(request(20, 20, seed=seed)).popitem()[1] for seed in (1, 2, 1))
    assert first == again != other


def test_cancelled_requests_end_at_once_and_do_not_change_later_tokens(cluster_of: ClusterOf) -> None:
    cluster = cluster_of(2)
    undisturbed = cluster.tokens(SHORT_PROMPT)
    first, second = cluster.engine.submit(request(40, 1000)), cluster.engine.submit(LONG_PROMPT)
    next(event for event in first.events() if isinstance(event, Token))
    first.cancel()
    second.cancel()
    for handle in (first, second):
        token_ids, end = rest_of(handle)
        assert (token_ids, end.reason) == ([], FinishReason.CANCELLED)
    assert cluster.tokens(SHORT_PROMPT) == undisturbed


def test_a_timed_out_request_keeps_its_tokens_and_does_not_change_other_requests(cluster_of: ClusterOf) -> None:
    cluster = cluster_of(2)
    tokens_alone = cluster.tokens(SHORT_PROMPT)[SHORT_PROMPT]
    during_decode, during_prefill = (replace(request(40, 2000), timeout_s=timeout_s) for timeout_s in (1.0, 1e-6))
    requests = (during_decode, SHORT_PROMPT, during_prefill)
    handles = cluster.engine.submit_all([Submission(submitted) for submitted in requests])
    (token_ids, timeout), (other_ids, end), (no_ids, early_timeout) = (rest_of(handle) for handle in handles)
    assert (timeout.reason, end.reason) == (FinishReason.TIMEOUT, FinishReason.LENGTH)
    assert early_timeout.reason is FinishReason.TIMEOUT
    assert 0 < len(token_ids) < 2000 and no_ids == []
    assert other_ids == tokens_alone


NUM_SEEDS = 20 if hypothesis.settings.get_current_profile_name() == "long" else 1
REQUEST_POOL = [
    replace(request(prompt_tokens, max_tokens, seed=seed), priority=priority)
    for seed, (prompt_tokens, max_tokens, priority) in enumerate(
        itertools.product((1, 2, 5, 9, 33, 40, 71, 100, 130, 200), (1, 6, 25), Priority)
    )
]


@pytest.fixture(scope="module")
def tokens_alone(cluster_of: ClusterOf) -> dict[Request, list[int]]:
    """Return the tokens of each request of REQUEST_POOL, run alone."""
    return {pooled: cluster_of(2).tokens(pooled)[pooled] for pooled in REQUEST_POOL}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_requests_of_two_threads_at_random_times_get_the_tokens_that_they_get_alone(
    cluster_of: ClusterOf, tokens_alone: dict[Request, list[int]], seed: int
) -> None:
    """Submit 25 requests on each of two threads, with 10 cancellations each. A cancelled request gets a prefix."""
    requests = random.Random(seed).sample(REQUEST_POOL, 50)
    engine = cluster_of(2).engine

    def submit(submitted: list[Request], rng: random.Random) -> list[tuple[Request, list[int], FinishReason]]:
        handles: list[Handle] = []
        cancel_after = rng.sample(range(len(submitted)), 10)
        for index, next_request in enumerate(submitted):
            threading.Event().wait(rng.expovariate(50))  # 20 ms on average
            handles.append(engine.submit(next_request))
            if index in cancel_after:
                cancelled = rng.choice(handles) if index % 2 else handles[-1]
                cancelled.cancel()
        ends = [rest_of(handle) for handle in handles]
        return [(handle.request, token_ids, end.reason) for handle, (token_ids, end) in zip(handles, ends, strict=True)]

    rngs = [random.Random(2 * seed), random.Random(2 * seed + 1)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(submit, (requests[:25], requests[25:]), rngs, timeout=120)
    results = [*first, *second]
    num_complete = 0
    for finished, token_ids, reason in results:
        if reason is FinishReason.CANCELLED:
            assert token_ids == tokens_alone[finished][: len(token_ids)]
        else:
            assert token_ids == tokens_alone[finished]
            num_complete += 1
    assert len(results) == 50 and num_complete >= 30  # at most 20 are cancelled


def test_every_stage_reports_its_steps_and_busy_time(cluster_of: ClusterOf) -> None:
    uses = cluster_of(2).engine.use
    steps_before = max(use.steps_done for use in uses)
    cluster_of(2).tokens(request(4, 10))  # one step for each token: the first one samples after the whole prompt
    while {use.steps_done for use in uses} != {steps_before + 10}:
        threading.Event().wait(0.001)
    assert all(use.busy_s > 0 for use in uses)


@pytest.mark.parametrize("num_stages", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 3, 7))])
def test_the_stages_load_each_tensor_once_with_embedding_first_and_head_last(
    cluster_of: ClusterOf, num_stages: int
) -> None:
    cluster = cluster_of(num_stages)
    names_by_rank = cluster.loaded.by_rank
    assert sorted(names_by_rank) == list(range(num_stages))
    not_loaded = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(NUM_LAYERS)}
    expected_names = cluster.deployment.model.index.weight_map.keys() - not_loaded
    assert Counter(itertools.chain(*names_by_rank.values())) == Counter(expected_names)
    for rank, names in names_by_rank.items():
        assert ("model.embed_tokens.weight" in names) == (rank == 0)
        assert ("model.norm.weight" in names) == ("lm_head.weight" in names) == (rank == num_stages - 1)
    held_bytes = [loaded.held_bytes for loaded in cluster.deployment.loaded]
    assert held_bytes == [plan.shard_bytes for plan in cluster.deployment.plans]


def error_after(
    model: Path,
    folder: Path,
    cause_fault: Callable[[], None],
    step_timeout: StepTimeout | None = None,
    stall_timeout_s: float = 8.0,
) -> ClusterError:
    """Return the error of a request over two stages that ``stage_process`` finds.

    ``cause_fault`` is called after the sixth token.
    """
    hosts = [marked_host(folder, rank, sys.executable) for rank in range(2)]
    with local_cluster(model, hosts, step_timeout, stall_timeout_s) as cluster, pytest.raises(ClusterError) as caught:
        for num_tokens, _ in enumerate(together(cluster.engine, request(8, 2000)), start=1):
            if num_tokens == 6:
                cause_fault()
    return caught.value


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_fault_of_a_killed_stage_names_the_stage_and_its_host(model: Path, tmp_path: Path, rank: int) -> None:
    error = error_after(model, tmp_path, lambda: stage_process(rank).kill())
    assert isinstance(error, StageFault)
    assert re.match(
        rf"stage {rank} on this machine \({PHASE_AND_STEP}\) ended with signal 9",
        str(error),
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_error_for_a_suspended_stage_names_host_step_and_phase(model: Path, tmp_path: Path, rank: int) -> None:
    error = error_after(model, tmp_path, lambda: stage_process(rank).suspend(), stall_timeout_s=1.0)
    assert isinstance(error, StageSilent)
    assert re.match(
        rf"stage {rank} on this machine \({PHASE_AND_STEP} for \d+ s\) is stopped: its process was suspended",
        str(error),
    )


@pytest.mark.slow
def test_the_error_of_a_step_timeout_names_the_late_stage_and_lists_every_status(model: Path, tmp_path: Path) -> None:
    error = error_after(
        model, tmp_path, lambda: stage_process(1).suspend(), StepTimeout(step_s=1.0, times_expected=0.0)
    )
    assert isinstance(error, StageSilent)
    assert re.match(
        r"stage 1 on this machine \(.+ for \d+ s\) has not finished step \d+ \(1 tokens\) after \d+ s; "
        r"the stages: stage 0 on this machine \(waiting for the next step after step \d+ for \d+ s\), "
        r"stage 1 on this machine \(.+\)",
        str(error),
    )
