"""Tests of a draft head's drafts in the scheduler: plans, counts, the choice of a source, and when drafts stop."""

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
from mlx_k2.scheduling.drafts import Draft, DraftCount, Drafts, DraftSource, merge_counts
from mlx_k2.scheduling.microbatch import Microbatch
from mlx_k2.scheduling.request import Priority, Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.step_policy import StepPolicy, drafted_token_s
from mlx_k2.scheduling.token_policy import TokenPolicy
from mlx_k2.testing.sleeping_stages import SIZES
from tests.scheduling.fake_stages import UNCHUNKED, FixedStepPolicy


@dataclass
class HeadRun:
    """A scheduler on stages whose sampled token is the last token + 1, and that have a draft head.

    ``is_right``: whether its drafts are right; a Random: 70% of them are. A right draft takes 20 ms, any other step
    40 ms.
    """

    num_stages: int
    is_right: random.Random | bool
    mode: DraftMode = DraftMode.MODEL
    policy: FixedStepPolicy = UNCHUNKED
    plans: list[Microbatch] = field(default_factory=list)
    num_skipped: int = 0
    clock_s: float = 0.0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            SchedulerLimits(num_slots=2, context_tokens=400, chunk_tokens=400, num_stages=self.num_stages),
            self.policy,
            draft_mode=self.mode,
        )
        self._in_flight: deque[Microbatch] = deque()
        self._last_sampled: dict[int, tuple[int, int]] = {}
        """Position and id of the last sampled token, by slot."""

    def submit(
        self,
        max_tokens: int,
        first: int = 0,
        policy: TokenPolicy | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> None:
        """Submit a request whose answer continues the prompt ``first``, ``first`` + 1."""
        request = Request((first, first + 1), max_tokens, Sampling(seed=0), frozenset(), priority=priority)
        self.scheduler.submit(request, policy)

    def restart(self) -> None:
        """Start again with empty caches."""
        self._in_flight.clear()
        self.scheduler.reset()

    def round(self) -> None:
        """Send all plans, then complete the oldest one as the last stage does: token, then drafts."""
        while (microbatch := self.scheduler.next_microbatch()) is not None:
            self.plans.append(microbatch)
            self._in_flight.append(microbatch)
        microbatch = self._in_flight.popleft()
        rows = [planned.row for planned in microbatch.rows]
        if rows[0].is_draft and self._last_sampled[rows[0].slot] != (rows[0].position, rows[0].token_ids[0]):
            self.num_skipped += 1
            self.scheduler.complete(microbatch.number, [], is_skipped=True)
            return
        sampling_rows = [row for row in rows if row.needs_logits]
        tokens = [SampledToken(row.token_ids[-1] + 1) for row in sampling_rows]
        self._last_sampled |= {row.slot: (row.end, row.token_ids[-1] + 1) for row in sampling_rows}
        self.clock_s += 0.02 if rows[0].is_draft else 0.04
        self.scheduler.complete(microbatch.number, tokens, now=self.clock_s)
        draft = rows[0].draft
        if draft is not None:
            self.scheduler.propose(microbatch, self._drafts(tokens[0].token_id, draft.num_tokens))

    def _drafts(self, token_id: int, count: int) -> list[int]:
        """Return the head's ``count`` tokens after ``token_id``. Those in plans are kept, if the first is right."""
        planned = [later.rows[0].row.token_ids[0] for later in self._in_flight if later.rows[0].row.is_draft]
        drafts = planned[1:] if planned[:1] == [token_id] else []
        while len(drafts) < count:
            previous = drafts[-1] if drafts else token_id
            drafts.append(previous + 1 if self._next_is_right() else previous + 7)
        return drafts[:count]

    def _next_is_right(self) -> bool:
        if isinstance(self.is_right, bool):
            return self.is_right
        return self.is_right.random() < 0.7

    def finish(self) -> None:
        """Run until no work is left."""
        while self.scheduler.has_work:
            self.round()


@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(1, 30))
def test_the_answer_is_the_same_whatever_the_head_drafts(rng: random.Random, num_stages: int, max_tokens: int) -> None:
    run = HeadRun(num_stages, rng)
    run.submit(max_tokens)
    run.finish()
    (sequence,) = {id(planned.sequence): planned.sequence for plan in run.plans for planned in plan.rows}.values()
    assert list(sequence.token_ids[sequence.num_prompt :]) == list(range(2, 2 + max_tokens))
    assert max(len(plan.rows) for plan in run.plans) == 1
    assert all(count.num_accepted <= count.num_drafted for count in sequence.drafts.counts)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_a_head_that_is_always_right_needs_one_plan_per_token(num_stages: int) -> None:
    run = HeadRun(num_stages, is_right=True)
    run.submit(60)
    run.finish()
    assert len(run.plans) <= 60 + num_stages
    assert run.num_skipped == 0


def test_a_head_that_is_always_wrong_needs_two_plans_per_token_and_the_last_stage_skips_one_of_them() -> None:
    run = HeadRun(2, is_right=False)
    run.submit(60)
    run.finish()
    assert len(run.plans) == pytest.approx(120, abs=3)
    assert run.num_skipped == pytest.approx(59, abs=2)


def test_with_four_stages_three_drafts_are_in_flight_and_each_position_has_its_own_count() -> None:
    run = HeadRun(4, random.Random(1))
    run.submit(200)
    run.finish()
    sequence = run.plans[0].rows[0].sequence
    assert {count.position for count in sequence.drafts.counts} == {1, 2, 3}
    first = next(count for count in sequence.drafts.counts if count.position == 1)
    assert first.num_accepted / first.num_drafted == pytest.approx(0.7, abs=0.15)
    assert all(plan.rows[0].row.draft for plan in run.plans if plan.rows[0].row.needs_logits)


def test_two_sequences_run_without_drafts_and_request_none() -> None:
    run = HeadRun(2, is_right=True)
    run.submit(20)
    run.submit(20, first=1000)
    for _ in range(15):
        run.round()
    rows = [planned.row for plan in run.plans for planned in plan.rows]
    assert not any(row.is_draft or row.draft for row in rows)


def test_an_interactive_sequence_gets_drafts_while_a_background_one_keeps_its_slot() -> None:
    run = HeadRun(2, is_right=True)
    run.submit(200, first=1000, priority=Priority.BACKGROUND)
    for _ in range(5):
        run.round()
    run.submit(40)
    while any(not sequence.is_background for sequence in [*run.scheduler.waiting, *run.scheduler.running]):
        run.round()
    rows = [planned.row for plan in run.plans for planned in plan.rows if not planned.sequence.is_background]
    assert len(run.scheduler.running) == 1
    assert sum(row.is_draft for row in rows) >= 38


@dataclass
class OneForced(TokenPolicy):
    """A policy that forces the answer's first token."""

    token_ids: list[int] = field(default_factory=lambda: [2])

    def forced(self) -> list[int]:
        forced, self.token_ids = self.token_ids, []
        return forced


@pytest.mark.parametrize("is_restart", [False, True])
def test_a_pause_between_answers_or_for_a_restart_is_not_measured_as_the_time_of_a_token(is_restart: bool) -> None:
    run = HeadRun(2, is_right=True, mode=DraftMode.AUTO)
    run.submit(200 if is_restart else 8)
    while run.scheduler.has_work and len(run.plans) < 12:
        run.round()
    run.clock_s += 3600
    if is_restart:
        run.restart()
    else:
        run.submit(200, policy=OneForced())
    run.finish()
    rows = [planned.row for plan in run.plans for planned in plan.rows]
    assert sum(row.is_draft for row in rows[60:]) > 0.9 * len(rows[60:])


def test_without_a_draft_head_mode_model_is_an_error_and_auto_becomes_ngram() -> None:
    assert effective_mode(DraftMode.AUTO, has_head=False) is DraftMode.NGRAM
    assert effective_mode(DraftMode.AUTO, has_head=True) is DraftMode.AUTO
    with pytest.raises(RequestError, match="--draft-model"):
        effective_mode(DraftMode.MODEL, has_head=False)


REPEATED = [1, 2, 3, 4, 5, 1, 2, 3, 4]
"""The last four tokens occurred before, and 5 followed them."""


def next_draft(drafts: Drafts, known_ids: list[int]) -> Draft:
    """Return the next draft after ``known_ids``, with a drafter that has indexed REPEATED."""
    drafter = NgramDrafter()
    drafter.index(REPEATED, 100)
    draft = drafts.next(known_ids, drafter)
    assert draft is not None
    return draft


def test_an_ngram_wins_over_the_head_only_with_four_tokens_and_a_better_acceptance() -> None:
    drafts = Drafts(DraftMode.AUTO)
    drafts.propose([9])
    before = next_draft(drafts, REPEATED)
    assert before.source is DraftSource.MODEL
    for _ in range(10):  # the head is wrong where the n-gram would be right
        drafts.propose([9])
        draft = next_draft(drafts, REPEATED)
        drafts.plan(draft)
        drafts.accept(5)
    drafts.propose([9])
    after = next_draft(drafts, REPEATED)
    assert (after.source, after.token_id) == (DraftSource.NGRAM, 5)
    with_short_match = next_draft(drafts, [7, *REPEATED[1:4], 8, 2, 3, 4])
    assert with_short_match.source is DraftSource.MODEL


def test_proposals_that_differ_from_the_drafts_in_plans_are_dropped() -> None:
    drafts = Drafts(DraftMode.MODEL)
    drafts.propose([4, 5])
    for _ in range(2):
        draft = next_draft(drafts, [])
        drafts.plan(draft)
    assert drafts.accept(4)
    drafts.propose([5, 6])
    draft = next_draft(drafts, [])
    assert draft.token_id == 6
    drafts.propose([7, 8])
    assert drafts.next([], NgramDrafter()) is None


def test_counts_of_several_answers_are_added_by_source_and_position() -> None:
    first = DraftCount(DraftSource.MODEL, position=1, num_drafted=10, num_accepted=7)
    second = DraftCount(DraftSource.MODEL, position=2, num_drafted=4, num_accepted=1)
    sum_of_first = DraftCount(DraftSource.MODEL, position=1, num_drafted=20, num_accepted=14)
    assert merge_counts([second, first, first]) == (sum_of_first, second)


@pytest.mark.parametrize(("draft_s", "is_faster"), [(0.001, True), (0.019, True), (0.2, False)])
def test_auto_decides_at_first_by_the_times_of_stages_and_head(draft_s: float, is_faster: bool) -> None:
    speed = StageSpeed(fixed_s=0.0, bytes_per_s=SIZES.dense_bytes / 0.02, operations_per_s=1.0)
    policy = StepPolicy([StageCost(SIZES, speed)] * 2)
    policy.observe_draft(draft_s)
    assert policy.drafts_are_faster() is is_faster
    assert DraftSwitch(policy.drafts_are_faster).is_on is is_faster


def test_the_predicted_time_of_a_drafted_token_is_between_a_cycle_and_a_pass_through_all_stages() -> None:
    assert drafted_token_s([0.02, 0.02], 0.002, 0.0, acceptance=1.0) == pytest.approx(0.022)
    assert drafted_token_s([0.03, 0.02], 0.002, 0.002, acceptance=0.0) == pytest.approx(0.052)
    assert drafted_token_s([0.03, 0.02], 0.002, 0.002, acceptance=0.5) == pytest.approx((0.031 + 0.052) / 2)


@pytest.mark.parametrize(("drafted_s", "plain_s", "fraction_on"), [(0.03, 0.02, 0.1), (0.02, 0.03, 0.9)])
def test_auto_uses_mostly_the_setting_that_was_measured_to_be_faster(
    drafted_s: float, plain_s: float, fraction_on: float
) -> None:
    switch = DraftSwitch(lambda: True)
    settings: list[bool] = []
    for _ in range(2000):
        settings.append(switch.is_on)
        switch.observe(drafted_s if switch.is_on else plain_s)
    late_settings = settings[64:]
    assert sum(late_settings) / len(late_settings) == pytest.approx(fraction_on, abs=0.1)
    assert len(set(late_settings)) == 2, "the slower setting is not measured again"
