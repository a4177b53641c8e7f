"""Tests of find_problem and find_draft_problem: a message that a correct stage does not send is described."""

import math

import pytest

from mlx_k2.coordinator.report_check import find_draft_problem, find_problem
from mlx_k2.protocol.messages import Drafted, FromStage, StepDone
from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.microbatch import Microbatch
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from tests.scheduling.fake_stages import WHOLE_CHUNKS

VOCAB_SIZE = 100
LIMITS = SchedulerLimits(num_slots=1, context_tokens=50, chunk_tokens=50, num_stages=2)


def scheduler_with_draft() -> tuple[Scheduler, Microbatch, Microbatch]:
    """Return a scheduler after a prompt, and its steps in flight: step 1 with the token 3, step 2 with the draft 4."""
    scheduler = Scheduler(LIMITS, WHOLE_CHUNKS, draft_mode=DraftMode.MODEL)
    scheduler.submit(Request((1, 2), 20, Sampling(seed=0), frozenset()))
    prompt = scheduler.next_microbatch()
    assert prompt is not None
    scheduler.complete(prompt.number, [SampledToken(3)])
    sampled_step = scheduler.next_microbatch()
    scheduler.propose(prompt, [4])
    draft = scheduler.next_microbatch()
    assert sampled_step is not None
    assert draft is not None
    return scheduler, sampled_step, draft


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
    _, sampled_step, _ = scheduler_with_draft()
    assert find_draft_problem(message, sampled_step, vocab_size=VOCAB_SIZE) == problem


def test_a_stage_may_skip_drafts_only_and_the_last_stage_only_wrong_ones() -> None:
    scheduler, sampled_step, draft = scheduler_with_draft()

    def problem_of_skipping(plan: Microbatch, *, is_last: bool) -> str | None:
        report = StepDone(plan.number, 0.0, is_skipped=True)
        return find_problem(report, plan, is_last=is_last, vocab_size=VOCAB_SIZE)

    assert problem_of_skipping(sampled_step, is_last=False) == "skipped step 1, which is not a draft"
    assert problem_of_skipping(draft, is_last=True) == "skipped step 2, whose draft is right"
    assert problem_of_skipping(draft, is_last=False) is None
    scheduler.complete(sampled_step.number, [SampledToken(9)])  # now the draft 4 is wrong
    assert problem_of_skipping(draft, is_last=True) is None


def test_drafts_instead_of_the_report_of_a_step_are_described() -> None:
    _, sampled_step, _ = scheduler_with_draft()
    problem = find_problem(Drafted(1, (4,), 0.0), sampled_step, is_last=True, vocab_size=VOCAB_SIZE)
    assert problem == "sent a Drafted between steps"
