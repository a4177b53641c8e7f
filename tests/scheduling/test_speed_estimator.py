"""Tests of the speed estimator: it fits a stage's speed to its steps, and keeps what the steps do not determine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.scheduling.cost_model import StageCost, StageSpeed, StepLoad, row_load
from mlx_k2.scheduling.speed_estimator import SpeedEstimator
from tests.scheduling.simulation import k2_sizes

SIZES = k2_sizes(2)[0]
EXPECTED = StageSpeed(0.003, 600e9, 15e12)
LOADS = [
    *(row_load(900 * count, 1, is_prompt=False, needs_logits=True) for count in range(1, 9)),
    *(row_load(0, count, is_prompt=True, needs_logits=False) for count in (1, 8, 64, 200, 512, 1000, 2000, 4000)),
]


def estimated(actual: StageCost, loads: list[StepLoad], noise: float = 0.0) -> StageCost:
    """Return the estimate after 64 steps whose times are the ``actual`` ones, by turns plus and minus ``noise``."""
    estimator = SpeedEstimator(SIZES, EXPECTED)
    for index in range(64):
        load = loads[index % len(loads)]
        estimator.observe(load, actual.step_s(load) * (1 + noise * (-1) ** index))
    return StageCost(SIZES, estimator.speed)


@given(st.floats(0.0, 0.02), st.floats(50e9, 2e12), st.floats(1e12, 60e12), st.floats(0, 0.1))
def test_after_steps_of_prefill_and_decode_all_their_times_are_predicted(
    fixed_s: float, bytes_per_s: float, operations_per_s: float, noise: float
) -> None:
    actual = StageCost(SIZES, StageSpeed(fixed_s, bytes_per_s, operations_per_s))
    estimate = estimated(actual, LOADS, noise)
    for load in LOADS:
        assert estimate.step_s(load) == pytest.approx(actual.step_s(load), rel=0.1 + 2 * noise)


@given(st.floats(0.3, 3.0))
def test_identical_steps_are_predicted_at_their_measured_time(factor: float) -> None:
    speed = StageSpeed(EXPECTED.fixed_s * factor, EXPECTED.bytes_per_s / factor, EXPECTED.operations_per_s / factor)
    actual = StageCost(SIZES, speed)
    assert estimated(actual, LOADS[:1]).step_s(LOADS[0]) == pytest.approx(actual.step_s(LOADS[0]), rel=0.1)


def test_without_measurements_the_expected_speed_is_used() -> None:
    assert SpeedEstimator(SIZES, EXPECTED).speed == EXPECTED
