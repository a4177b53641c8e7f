"""Tests of a draft head's drafts in the scheduler: plans, counts, the choice between sources, and when to draft."""

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.errors import RequestError
from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.cost_model import StageCost, StageSpeed
from mlx_k2.scheduling.draft_switch import DraftSwitch
from mlx_k2.scheduling.drafter import DraftMode, NgramDrafter, effective_mode
from mlx_k2.scheduling.drafts import DraftCount, Drafts, DraftSource, merge_counts
from mlx_k2.scheduling.microbatch import Microbatch, PlannedRow
from mlx_k2.scheduling.request import Priority, Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.step_policy import StepPolicy, drafted_token_s
from mlx_k2.scheduling.token_policy import TokenPolicy
from mlx_k2.testing.sleeping_stages import SIZES
from tests.scheduling.fake_stages import WHOLE_CHUNKS


@dataclass
class HeadRun:
    """A scheduler over stages with a draft head. After token i they sample i + 1; a wrong draft is i + 7.

    A step with a right draft takes 20 ms, a skipped step no time, and any other step 40 ms.
    """

    num_stages: int
    acceptance: float
    """The probability that a draft is right."""
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    mode: DraftMode = DraftMode.MODEL
    plans: list[Microbatch] = field(default_factory=list)
    num_skipped: int = 0
    """Number of plans that the last stage skipped."""
    clock_s: float = 0.0

    def __post_init__(self) -> None:
        limits = SchedulerLimits(num_slots=2, context_tokens=400, chunk_tokens=400, num_stages=self.num_stages)
        self.scheduler = Scheduler(limits, WHOLE_CHUNKS, draft_mode=self.mode)
        self._in_flight: deque[Microbatch] = deque()
        self._sampled: dict[int, tuple[int, int]] = {}
        """The position and the id of the latest sampled token, by slot."""

    @property
    def rows(self) -> list[PlannedRow]:
        """All rows in the order in which they were sent."""
        return [planned for plan in self.plans for planned in plan.rows]

    def submit(
        self,
        max_tokens: int,
        first_id: int = 0,
        policy: TokenPolicy | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> None:
        """Submit a request with the prompt ``first_id``, ``first_id`` + 1."""
        request = Request((first_id, first_id + 1), max_tokens, Sampling(seed=0), frozenset(), priority=priority)
        self.scheduler.submit(request, policy)

    def restart(self) -> None:
        """Drop all steps in flight and reset the scheduler, as a restart of the stages does."""
        self._in_flight.clear()
        self.scheduler.reset()

    def step(self) -> None:
        """Send all plans, then complete the oldest one as the last stage does: token, then drafts."""
        while (microbatch := self.scheduler.next_microbatch()) is not None:
            self.plans.append(microbatch)
            self._in_flight.append(microbatch)
        microbatch = self._in_flight.popleft()
        rows = [planned.row for planned in microbatch.rows]
        if rows[0].is_draft and self._sampled[rows[0].slot] != (rows[0].position, rows[0].token_ids[0]):
            self.num_skipped += 1
            self.scheduler.complete(microbatch.number, [], is_skipped=True)
            return
        sampling_rows = [row for row in rows if row.needs_logits]
        tokens = [SampledToken(row.token_ids[-1] + 1) for row in sampling_rows]
        self._sampled |= {row.slot: (row.end, token.token_id) for row, token in zip(sampling_rows, tokens, strict=True)}
        self.clock_s += 0.02 if rows[0].is_draft else 0.04
        self.scheduler.complete(microbatch.number, tokens, now=self.clock_s)
        draft_request = rows[0].draft
        if draft_request is not None:
            self.scheduler.propose(microbatch, self._drafts(tokens[0].token_id, draft_request.num_tokens))

    def _drafts(self, token_id: int, count: int) -> list[int]:
        """Return ``count`` drafts after ``token_id``. Keep those in plans if the first is right, as a stage does."""
        planned_ids = [plan.rows[0].row.token_ids[0] for plan in self._in_flight if plan.rows[0].row.is_draft]
        drafts = planned_ids[1:] if planned_ids[:1] == [token_id] else []
        while len(drafts) < count:
            previous_id = drafts[-1] if drafts else token_id
            drafts.append(previous_id + (1 if self.rng.random() < self.acceptance else 7))
        return drafts[:count]

    def finish(self) -> None:
        """Run until no work is left."""
        while self.scheduler.has_work:
            self.step()


@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(1, 30))
def test_the_answer_is_the_same_whatever_the_head_drafts(rng: random.Random, num_stages: int, max_tokens: int) -> None:
    run = HeadRun(num_stages, acceptance=0.7, rng=rng)
    run.submit(max_tokens)
    run.finish()
    sequence = run.rows[0].sequence
    assert list(sequence.token_ids[sequence.num_prompt :]) == list(range(2, 2 + max_tokens))
    assert max(len(plan.rows) for plan in run.plans) == 1
    assert all(count.num_accepted <= count.num_drafted for count in sequence.drafts.counts)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_with_a_head_that_is_always_right_an_answer_needs_one_plan_per_token(num_stages: int) -> None:
    run = HeadRun(num_stages, acceptance=1.0)
    run.submit(60)
    run.finish()
    assert len(run.plans) <= 60 + num_stages
    assert run.num_skipped == 0


def test_with_a_head_that_is_always_wrong_an_answer_needs_two_plans_per_token_of_which_one_is_skipped() -> None:
    run = HeadRun(2, acceptance=0.0)
    run.submit(60)
    run.finish()
    assert len(run.plans) == pytest.approx(120, abs=3)
    assert run.num_skipped == pytest.approx(59, abs=2)


def test_four_stages_get_drafts_at_three_positions_which_are_counted_separately() -> None:
    run = HeadRun(4, acceptance=0.7)
    run.submit(200)
    run.finish()
    counts = run.rows[0].sequence.drafts.counts
    assert {count.position for count in counts} == {1, 2, 3}
    first = next(count for count in counts if count.position == 1)
    assert first.num_accepted / first.num_drafted == pytest.approx(0.7, abs=0.15)
    assert all(planned.row.draft for planned in run.rows if planned.row.needs_logits)


def test_two_sequences_run_without_drafts_and_request_none() -> None:
    run = HeadRun(2, acceptance=1.0)
    run.submit(20)
    run.submit(20, first_id=1000)
    for _ in range(15):
        run.step()
    assert not any(planned.row.is_draft or planned.row.draft for planned in run.rows)


def test_an_interactive_sequence_gets_drafts_while_a_background_one_keeps_its_slot() -> None:
    run = HeadRun(2, acceptance=1.0)
    run.submit(200, first_id=1000, priority=Priority.BACKGROUND)
    for _ in range(5):
        run.step()
    run.submit(40)
    while any(not sequence.is_background for sequence in [*run.scheduler.waiting, *run.scheduler.running]):
        run.step()
    assert len(run.scheduler.running) == 1
    num_drafts = sum(planned.row.is_draft for planned in run.rows if not planned.sequence.is_background)
    assert num_drafts >= 38  # of 40 tokens


@dataclass
class FirstTokenForced(TokenPolicy):
    """A token policy that forces 2 as the answer's first token.

    The first sampled token then follows a generated token, as any later one, and not the prompt.
    """

    token_ids: list[int] = field(default_factory=lambda: [2])

    def forced(self) -> list[int]:
        forced_ids, self.token_ids = self.token_ids, []
        return forced_ids


@pytest.mark.parametrize("is_restart", [False, True])
def test_an_hour_between_answers_or_for_a_restart_is_not_measured_as_the_time_of_a_token(is_restart: bool) -> None:
    run = HeadRun(2, acceptance=1.0, mode=DraftMode.AUTO)
    run.submit(200 if is_restart else 8)  # only the answer of 8 tokens ends within 12 plans
    while run.scheduler.has_work and len(run.plans) < 12:
        run.step()
    run.clock_s += 3600
    if is_restart:
        run.restart()
    else:
        run.submit(200, policy=FirstTokenForced())
    run.finish()
    later_rows = run.rows[60:]  # after the first measurements with and without drafts
    assert sum(planned.row.is_draft for planned in later_rows) > 0.9 * len(later_rows)


def test_without_a_draft_head_the_mode_auto_is_ngram_and_the_mode_model_an_error() -> None:
    assert effective_mode(DraftMode.AUTO, has_head=False) is DraftMode.NGRAM
    assert effective_mode(DraftMode.AUTO, has_head=True) is DraftMode.AUTO
    with pytest.raises(RequestError, match="--draft-model"):
        effective_mode(DraftMode.MODEL, has_head=False)


REPETITION = [1, 2, 3, 4, 5, 1, 2, 3, 4]
"""Tokens of which the last four occurred before, followed by 5."""


def plan_next(drafts: Drafts, text: list[int], drafter: NgramDrafter) -> tuple[DraftSource, int]:
    """Put the next draft into a plan; return its source and its token id."""
    draft = drafts.next(text, drafter)
    assert draft is not None
    drafts.plan(draft)
    return draft.source, draft.token_id


def test_a_draft_of_the_head_is_replaced_by_one_of_an_ngram_of_four_tokens_that_is_right_more_often() -> None:
    drafts = Drafts(DraftMode.AUTO)
    drafter = NgramDrafter()
    drafter.index(REPETITION, 100)
    drafts.propose([9])
    assert plan_next(drafts, REPETITION, drafter) == (DraftSource.MODEL, 9)  # nothing is known of the n-grams yet
    drafts.accept(5)
    for _ in range(10):
        drafts.propose([9])
        plan_next(drafts, REPETITION, drafter)
        drafts.accept(5)  # the n-gram's draft would be right
    drafts.propose([9])
    assert plan_next(drafts, [7, 2, 3, 4, 8, 2, 3, 4], drafter) == (DraftSource.MODEL, 9)  # three tokens match
    drafts.accept(5)
    drafts.propose([9])
    assert plan_next(drafts, REPETITION, drafter) == (DraftSource.NGRAM, 5)


def test_proposals_that_differ_from_the_drafts_in_plans_are_dropped() -> None:
    drafts = Drafts(DraftMode.MODEL)
    drafts.propose([4, 5])
    for token_id in (4, 5):
        assert plan_next(drafts, [], NgramDrafter()) == (DraftSource.MODEL, token_id)
    assert drafts.accept(4)
    drafts.propose([5, 6])
    draft = drafts.next([], NgramDrafter())
    assert draft is not None
    assert draft.token_id == 6
    drafts.propose([7, 8])
    assert drafts.next([], NgramDrafter()) is None


def test_counts_of_several_answers_are_added_by_source_and_position() -> None:
    first_position = DraftCount(DraftSource.MODEL, 1, 10, 7)
    second_position = DraftCount(DraftSource.MODEL, 2, 4, 1)
    merged = merge_counts([second_position, first_position, first_position])
    assert merged == (DraftCount(DraftSource.MODEL, 1, 20, 14), second_position)


# 0.019: a cycle of 20 + 19 ms is shorter than the 41 ms through both stages.
@pytest.mark.parametrize(("draft_s", "is_faster"), [(0.001, True), (0.019, True), (0.2, False)])
def test_auto_drafts_at_first_if_the_costs_of_stages_and_head_predict_that_drafts_are_faster(
    draft_s: float, is_faster: bool
) -> None:
    speed = StageSpeed(fixed_s=0.0, bytes_per_s=SIZES.dense_bytes / 0.02, operations_per_s=1.0)
    policy = StepPolicy([StageCost(SIZES, speed)] * 2)  # 20 ms for a token on each stage
    policy.observe_draft(draft_s)
    assert policy.drafts_are_faster() is is_faster
    assert DraftSwitch(policy.drafts_are_faster).is_on is is_faster


def test_the_predicted_time_of_a_drafted_token_is_between_a_cycle_and_the_time_of_all_stages() -> None:
    stages_s, turnaround_s = [0.03, 0.02], 0.002
    cycle_s = max(stages_s) + turnaround_s / len(stages_s)  # the slower stage with its hop
    all_stages_s = sum(stages_s) + turnaround_s
    for acceptance, expected_s in [(1.0, cycle_s), (0.0, all_stages_s), (0.5, (cycle_s + all_stages_s) / 2)]:
        token_s = drafted_token_s(stages_s, draft_s=0.002, turnaround_s=turnaround_s, acceptance=acceptance)
        assert token_s == pytest.approx(expected_s)
    # the last stage with the draft head is the slowest
    assert drafted_token_s([0.02, 0.02], draft_s=0.002, turnaround_s=0.0, acceptance=1.0) == pytest.approx(0.022)


@pytest.mark.parametrize(("drafted_s", "plain_s", "drafted_part"), [(0.03, 0.02, 0.1), (0.02, 0.03, 0.9)])
def test_auto_mostly_drafts_if_drafts_were_measured_to_be_faster_and_sometimes_measures_again(
    drafted_s: float, plain_s: float, drafted_part: float
) -> None:
    switch = DraftSwitch(lambda: True)
    has_drafted: list[bool] = []
    for _ in range(2000):
        has_drafted.append(switch.is_on)
        switch.observe(drafted_s if switch.is_on else plain_s)
    later = has_drafted[64:]  # after the first measurements with and without drafts
    assert sum(later) / len(later) == pytest.approx(drafted_part, abs=0.1)
    assert set(later) == {True, False}
