"""Tests of the times of decode steps with a draft head, collected from the reports of stages."""

import pytest

from mlx_k2.coordinator.draft_times import DraftTimer
from mlx_k2.deployment.listener import StageReport
from mlx_k2.protocol.messages import StepDone
from mlx_k2.sampling import SampledToken
from tests.coordinator.test_report_check import planned_steps

STAGES_S = (0.03, 0.02)
HOP_S = 0.001
HEAD_S = 0.004


def test_right_and_wrong_drafts_give_the_hop_and_the_expected_time_of_a_cycle() -> None:
    _, known, draft = planned_steps()
    timer = DraftTimer(2)
    now = 0.0
    for microbatch, between_s in ((known, 0.052), (draft, 0.031), (draft, 0.031), (known, 0.052)):
        now += between_s
        for rank, busy_s in enumerate(STAGES_S):
            timer.add(StageReport(rank, microbatch, StepDone(0, busy_s, tokens=(SampledToken(1),)), now))
    timer.add(StageReport(1, draft, StepDone(0, 0.0, is_skipped=True), now + 99))
    times = timer.times(HEAD_S)
    assert times is not None
    assert times.stages_s == STAGES_S
    assert times.hop_s == pytest.approx(HOP_S)
    assert times.right_s == pytest.approx(0.031)
    assert times.wrong_s == pytest.approx(0.052)
    assert times.cycle_s == pytest.approx(STAGES_S[0] + HOP_S)


def test_without_a_right_draft_there_are_no_times() -> None:
    _, known, _ = planned_steps()
    timer = DraftTimer(2)
    for now in (1.0, 2.0):
        for rank in range(2):
            timer.add(StageReport(rank, known, StepDone(0, 0.02), now))
    assert timer.times(HEAD_S) is None
