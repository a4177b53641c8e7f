"""Tests of the stages' activity: fractions of the last seconds, and one hour of history."""

from collections.abc import Iterator

import pytest

from mlx_k2.cluster.partition import StageAssignment
from mlx_k2.deployment.listener import StageReport
from mlx_k2.deployment.plan import StagePlan
from mlx_k2.protocol.messages import LayerLoaded, StepDone
from mlx_k2.scheduling.microbatch import Microbatch, PlannedRow
from mlx_k2.scheduling.sequence import Sequence
from mlx_k2.server import cluster_activity
from mlx_k2.server.cluster_activity import INTERVAL_S, NUM_INTERVALS, ClusterActivity
from tests.coordinator.token_engine import request
from tests.local_cluster import local_host


class Clock:
    """A stand-in for the module ``time``, whose clock a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(cluster_activity, "time", clock)
    yield clock


def activity_of_two_stages() -> ClusterActivity:
    """Return the activity of a stage with layers 0 to 2 and one with layers 3 and 4."""
    plans = []
    for rank, (first_layer, end_layer) in enumerate(((0, 3), (3, 5))):
        assignment = StageAssignment(first_layer=first_layer, end_layer=end_layer, held_bytes=9, read_bytes=9)
        plans.append(
            StagePlan(rank, local_host(), assignment, shard_bytes=100, needed_bytes=200, block_bytes=0, files=())
        )
    activity = ClusterActivity()
    activity.plans = plans
    return activity


def add_step(activity: ClusterActivity, rank: int, busy_s: float, receive_s: float = 0.0) -> None:
    """Add the report of a stage that a step of 4 tokens is done."""
    prompt = request(0, 1, 2, 3)
    sequence = Sequence(prompt, context_tokens=100)
    sequence.slot = 0
    row = PlannedRow.of(sequence, prompt.prompt_ids)
    step_done = StepDone(number=0, busy_s=busy_s, receive_s=receive_s)
    activity.add_report(StageReport(rank, Microbatch(number=0, rows=(row,)), step_done, received_at=0.0))


def test_fractions_are_of_the_last_10_to_20_seconds(clock: Clock) -> None:
    activity = activity_of_two_stages()
    clock.now += 100
    for _ in range(10):
        add_step(activity, 0, busy_s=0.5)
        add_step(activity, 1, busy_s=0.25, receive_s=0.5)
        clock.now += 1
    first, last = activity.stages()
    assert (first["busy_fraction"], last["busy_fraction"]) == (0.5, 0.25)
    assert (first["waiting_fraction"], last["waiting_fraction"]) == (0, 0.5)
    assert (first["first_layer"], first["last_layer"], last["last_layer"]) == (0, 2, 4)
    clock.now += 2 * INTERVAL_S
    assert [stage["busy_fraction"] for stage in activity.stages()] == [0, 0]


def test_the_history_has_the_last_hour_and_no_more(clock: Clock) -> None:
    activity = activity_of_two_stages()
    for _ in range(2 * NUM_INTERVALS):
        add_step(activity, 0, busy_s=2.5)
        add_step(activity, 1, busy_s=5.0)
        activity.add_token()
        clock.now += INTERVAL_S
    history = activity.history()
    assert NUM_INTERVALS - 1 <= len(history) <= NUM_INTERVALS
    assert history[0]["seconds_ago"] <= 3600 + INTERVAL_S
    assert all((point["tokens"], point["computed_tokens"]) == (1, 4) for point in history)
    assert all(point["busy_fractions"] == [0.25, 0.5] for point in history)
    clock.now += 3600
    assert activity.history() == []


def test_loaded_bytes_grow_with_each_layer() -> None:
    activity = activity_of_two_stages()
    activity.progress(1, LayerLoaded(tensor_names=(), held_bytes=30))
    activity.progress(1, LayerLoaded(tensor_names=(), held_bytes=20))
    assert [stage["loaded_bytes"] for stage in activity.stages()] == [0, 50]
