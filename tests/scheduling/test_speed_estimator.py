"""Tests of the speed estimator, which computes the speed of a stage from the times of its steps."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.scheduling.cost_model import StageCost, StageSpeed, StepLoad, row_load
from mlx_k2.scheduling.speed_estimator import SpeedEstimator
from tests.scheduling.simulation import k2_sizes

SIZES = k2_sizes(2)[0]
EXPECTED_SPEED = StageSpeed(fixed_s=0.003, bytes_per_s=600e9, operations_per_s=15e12)
LOADS = [
    *(row_load(900 * count, 1, is_prompt=False, needs_logits=True) for count in range(1, 9)),
    *(row_load(0, count, is_prompt=True, needs_logits=False) for count in (1, 8, 64, 200, 512, 1000, 2000, 4000)),
]


def estimated_cost(speed: StageSpeed, loads: list[StepLoad], noise: float = 0.0) -> StageCost:
    """Return the cost that is estimated from 64 steps. ``noise`` is the relative error of each time."""
    estimator = SpeedEstimator(SIZES, EXPECTED_SPEED)
    stage = StageCost(SIZES, speed)
    for index, load in enumerate(itertools.islice(itertools.cycle(loads), 64)):
        estimator.observe(load, stage.step_s(load) * (1 + noise * (-1) ** index))
    return StageCost(SIZES, estimator.speed)


@given(st.floats(0.0, 0.02), st.floats(50e9, 2e12), st.floats(1e12, 60e12), st.floats(0, 0.1))
def test_after_steps_of_prefill_and_decode_all_step_times_are_predicted(
    fixed_s: float, bytes_per_s: float, operations_per_s: float, noise: float
) -> None:
    speed = StageSpeed(fixed_s, bytes_per_s, operations_per_s)
    estimated, stage = estimated_cost(speed, LOADS, noise), StageCost(SIZES, speed)
    for load in LOADS:
        assert estimated.step_s(load) == pytest.approx(stage.step_s(load), rel=0.1 + 2 * noise)


@given(st.floats(0.3, 3.0))
def test_after_steps_of_one_load_the_time_of_this_load_is_predicted(times_slower: float) -> None:
    speed = StageSpeed(
        EXPECTED_SPEED.fixed_s * times_slower,
        EXPECTED_SPEED.bytes_per_s / times_slower,
        EXPECTED_SPEED.operations_per_s / times_slower,
    )
    estimated = estimated_cost(speed, LOADS[:1])
    assert estimated.step_s(LOADS[0]) == pytest.approx(StageCost(SIZES, speed).step_s(LOADS[0]), rel=0.1)


def test_without_measurements_the_expected_speed_is_used() -> None:
    assert SpeedEstimator(SIZES, EXPECTED_SPEED).speed == EXPECTED_SPEED
