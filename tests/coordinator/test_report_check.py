"""Tests of the checks of reports about drafts. test_lying_stage.py has those of other reports."""

import math

import pytest

from mlx_k2.coordinator.report_check import find_draft_problem, find_problem
from mlx_k2.protocol.messages import Drafted, FromStage, StepDone
from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.microbatch import Microbatch
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from tests.scheduling.fake_stages import UNCHUNKED

VOCAB_SIZE = 100


def planned_steps() -> tuple[Scheduler, Microbatch, Microbatch]:
    """Return a scheduler that has completed a prompt, and its plans of the next token and of a draft after it."""
    scheduler = Scheduler(
        SchedulerLimits(num_slots=1, context_tokens=50, chunk_tokens=50, num_stages=2),
        UNCHUNKED,
        draft_mode=DraftMode.MODEL,
    )
    scheduler.submit(Request((1, 2), 20, Sampling(seed=0), frozenset()))
    prompt = scheduler.next_microbatch()
    assert prompt is not None
    scheduler.complete(prompt.number, [SampledToken(3)])
    known = scheduler.next_microbatch()
    scheduler.propose(prompt, [4])
    draft = scheduler.next_microbatch()
    assert known is not None
    assert draft is not None
    return scheduler, known, draft


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (Drafted(1, (4,), 0.001), None),
        (Drafted(1, (), 0.001), None),
        (Drafted(2, (4,), 0.001), "sent a Drafted where the drafts after step 1 are due"),
        (StepDone(2, 0.0), "sent a StepDone where the drafts after step 1 are due"),
        (Drafted(1, (4, 5), 0.001), "sent 2 drafts after step 1, more than requested"),
        (Drafted(1, (VOCAB_SIZE,), 0.001), "sent the token id 100, and the vocabulary has 100"),
        (Drafted(1, (4,), math.nan), "reported an impossible time of the drafts after step 1"),
    ],
)
def test_drafts_that_a_head_cannot_have_made_are_described(message: FromStage, problem: str | None) -> None:
    _, known, _ = planned_steps()
    assert find_draft_problem(message, known, vocab_size=VOCAB_SIZE) == problem


def test_a_stage_skips_drafts_only_and_the_last_one_only_those_that_are_wrong() -> None:
    scheduler, known, draft = planned_steps()

    def problem_of_skipping(step: Microbatch, *, is_last: bool) -> str | None:
        report = StepDone(step.number, 0.0, is_skipped=True)
        return find_problem(report, step, is_last=is_last, vocab_size=VOCAB_SIZE)

    assert problem_of_skipping(known, is_last=False) == "skipped step 1, which is not a draft"
    assert problem_of_skipping(draft, is_last=True) == "skipped step 2, whose draft is right"
    assert problem_of_skipping(draft, is_last=False) is None
    scheduler.complete(known.number, [SampledToken(9)])  # the draft is 4
    assert problem_of_skipping(draft, is_last=True) is None


def test_drafts_where_a_steps_report_is_due_are_refused() -> None:
    _, known, _ = planned_steps()
    problem = find_problem(Drafted(1, (4,), 0.0), known, is_last=True, vocab_size=VOCAB_SIZE)
    assert problem == "sent a Drafted between steps"
