"""Tests of DraftTimer: the times of decode steps with a draft head, computed from the reports of stages."""

import pytest

from mlx_k2.coordinator.draft_times import DraftTimer
from mlx_k2.deployment.listener import StageReport
from mlx_k2.protocol.messages import StepDone
from mlx_k2.sampling import SampledToken
from tests.coordinator.test_report_check import scheduler_with_draft

STAGES_S = (0.03, 0.02)
HOP_S = 0.001
HEAD_S = 0.004
RIGHT_S = STAGES_S[0] + HOP_S
"""Time between two results where the draft is right: the second stage computes while the first one does."""
WRONG_S = sum(STAGES_S) + 2 * HOP_S


def test_the_times_of_steps_with_right_and_wrong_drafts_give_the_times_of_hop_and_cycle() -> None:
    _, sampled_step, draft_step = scheduler_with_draft()
    timer = DraftTimer(num_stages=len(STAGES_S))
    now = 0.0
    for microbatch, step_s in (
        (sampled_step, WRONG_S),
        (draft_step, RIGHT_S),
        (draft_step, RIGHT_S),
        (sampled_step, WRONG_S),
    ):
        now += step_s
        for rank, busy_s in enumerate(STAGES_S):
            timer.add(StageReport(rank, microbatch, StepDone(0, busy_s, tokens=(SampledToken(1),)), now))
    timer.add(StageReport(1, draft_step, StepDone(0, 0.0, is_skipped=True), now + 99))  # not counted: it has no token
    times = timer.times(HEAD_S)
    assert times is not None
    assert times.stages_s == STAGES_S
    assert times.hop_s == pytest.approx(HOP_S)
    assert times.right_s == pytest.approx(RIGHT_S)
    assert times.wrong_s == pytest.approx(WRONG_S)
    assert times.cycle_s == pytest.approx(STAGES_S[0] + HOP_S)


def test_without_a_right_draft_there_are_no_times() -> None:
    _, sampled_step, _ = scheduler_with_draft()
    timer = DraftTimer(2)
    for now in (1.0, 2.0):
        for rank in range(2):
            timer.add(StageReport(rank, sampled_step, StepDone(0, 0.02), now))
    assert timer.times(HEAD_S) is None
