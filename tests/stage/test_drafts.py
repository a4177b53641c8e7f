"""Tests of a draft head on real layers, in float32 on a CPU: tokens, cache rows, drafts in flight, skipped plans."""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
import mlx.core as mx
import pytest

from mlx_k2.protocol.messages import Step, StepDone
from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.microbatch import DraftRequest, Microbatch, Row
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.testing.random_draft_head import draft_config_fields, write_random_draft_head
from mlx_k2.weights.draft_head import LM_HEAD
from tests.model.checkpoints import VARIANTS, Checkpoint, read_config
from tests.scheduling.fake_stages import FixedStepPolicy
from tests.stage.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("as_a_stage_on_a_cpu")

CONTEXT_TOKENS = 160
CHUNK_TOKENS = 24
NUM_PROMPT = 30
GREEDY = Sampling(seed=3, temperature=0)
NUM_CASES = 150 if hypothesis.settings.get_current_profile_name() == "long" else 12
"""Cases of requests for each number of stages."""


def prompt_of(length: int) -> tuple[int, ...]:
    """Return a fixed prompt of ``length`` tokens."""
    return tuple((31 * index) % 500 for index in range(length))


def prompt_row(num_drafts: int | None = None) -> Row:
    """Return the row of a prompt of NUM_PROMPT tokens in slot 0, which requests ``num_drafts`` drafts."""
    prompt = prompt_of(NUM_PROMPT)
    draft = None if num_drafts is None else DraftRequest(num_drafts)
    return Row(slot=0, position=0, token_ids=prompt, is_prompt=True, sampling=GREEDY, recent_ids=prompt, draft=draft)


def token_row(token_id: int, position: int, *, is_draft: bool = True) -> Row:
    """Return the row of a draft token, or of a sampled token, in slot 0."""
    return Row(slot=0, position=position, token_ids=(token_id,), is_prompt=False, sampling=GREEDY, is_draft=is_draft)


@pytest.fixture(scope="module")
def head(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random draft head for the checkpoint."""
    folder = tmp_path_factory.mktemp("heads") / "head"
    fields = draft_config_fields(VARIANTS["thinking"], draft_vocab_size=300)
    write_random_draft_head(folder, fields, read_config(checkpoint("thinking")), 5, own_tensors=(LM_HEAD,))
    return folder


@dataclass
class RequestCase:
    """A request, the number of tokens after which it is cancelled, and a companion that runs at the same time."""

    request: Request
    cancel_after: int | None = None
    companion: Request | None = None


def request_cases(seed: int, count: int) -> list[RequestCase]:
    """Return random cases. Many prompts begin alike, so that a slot's prefix is used again or copied."""
    chance = random.Random(seed)
    beginning = tuple(chance.randrange(500) for _ in range(60))

    def make_request(index: int) -> Request:
        words = tuple(chance.randrange(500) for _ in range(chance.randint(1, 30)))
        prompt_ids = beginning[: chance.choice([0, 17, 40, 60])] + words
        sampling = Sampling(
            seed=index,
            temperature=chance.choice([0.0, 1.0, 0.7]),
            top_p=chance.choice([1.0, 0.9]),
            top_k=chance.choice([None, 40]),
            min_p=chance.choice([0.0, 0.02]),
            repetition_penalty=chance.choice([1.0, 1.2]),
            presence_penalty=chance.choice([0.0, 1.0]),
            frequency_penalty=chance.choice([0.0, 0.5]),
            logit_bias=chance.choice([(), ((3, 4.0), (9, -5.0))]),
            num_logprobs=2,
        )
        return Request(prompt_ids, chance.randint(2, 16), sampling, frozenset({7}))

    cases = []
    for index in range(count):
        request = make_request(2 * index)
        cancel_after = chance.choice([None, None, None, chance.randint(1, 5)])
        companion = make_request(2 * index + 1) if chance.random() < 0.2 else None
        cases.append(RequestCase(request, cancel_after, companion))
    return cases


@dataclass
class PipelinedStages:
    """Stages that take turns, each with another plan: a draft is in flight before the token of its position is sampled.

    ``answers`` holds the token ids of known answers. With ``right_draft_probability`` the head's drafts are replaced by
    tokens of the answer.
    """

    pipeline: Pipeline
    scheduler: Scheduler
    answers: dict[Request, list[int]] = field(default_factory=dict)
    right_draft_probability: float = 0.0
    num_skipped: int = 0
    num_accepted: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(2))

    def __post_init__(self) -> None:
        self._waiting: list[deque[Step]] = [deque() for _ in self.pipeline.runners]
        self._microbatches: dict[int, Microbatch] = {}

    def run(self, case: RequestCase) -> list[list[SampledToken]]:
        """Run a request and its companion; return the tokens of each."""
        tokens: dict[int, list[SampledToken]] = {}  # by id of the sequence
        sequences = []
        for request in (case.request, case.companion):
            if request is not None:
                sequences.append(self.scheduler.submit(request).sequence)
                tokens[id(sequences[-1])] = []
        while self.scheduler.has_work:
            self._send()
            for done in self._run_stages():
                for sequence, appended in self._complete(done):
                    tokens[id(sequence)] += appended
            if case.cancel_after is not None and len(tokens[id(sequences[0])]) >= case.cancel_after:
                self.scheduler.stop(sequences[0], FinishReason.CANCELLED)
        self.num_accepted += sum(count.num_accepted for sequence in sequences for count in sequence.drafts.counts)
        return list(tokens.values())

    def _send(self) -> None:
        while (microbatch := self.scheduler.next_microbatch()) is not None:
            step = Step(microbatch.number, tuple(planned.row for planned in microbatch.rows))
            self._microbatches[microbatch.number] = microbatch
            self.pipeline.expect(step)
            self._waiting[0].append(step)

    def _run_stages(self) -> Iterator[StepDone]:
        """Run one waiting step on each stage, the last stage first; yield the last stage's answer."""
        for rank in reversed(range(len(self._waiting))):
            if not self._waiting[rank]:
                continue
            step = self._waiting[rank].popleft()
            done = self.pipeline.runners[rank].run(step)
            if rank + 1 < len(self._waiting):
                self._waiting[rank + 1].append(step)
            else:
                yield done

    def _complete(self, done: StepDone) -> Iterator[tuple[object, list[SampledToken]]]:
        """Pass an answer and the drafts after it to the scheduler; yield each sequence with its new tokens."""
        microbatch = self._microbatches.pop(done.number)
        self.num_skipped += done.is_skipped
        completed = self.scheduler.complete(done.number, done.tokens, is_skipped=done.is_skipped)
        drafted = self.pipeline.runners[-1].draft()
        draft_request = microbatch.rows[0].row.draft
        assert (drafted is not None) == (
            draft_request is not None and not done.is_skipped and self.pipeline.head is not None
        )
        if drafted is not None:
            self.scheduler.propose(microbatch, self._replace_drafts(microbatch, drafted.token_ids))
        for result in completed:
            yield result.sequence, [appended.token for appended in result.tokens]

    def _replace_drafts(self, microbatch: Microbatch, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the head's drafts, or with ``right_draft_probability`` the answer's tokens in their place."""
        (planned,) = microbatch.rows
        # the step samples the token at position row.end, and the drafts follow it
        start = planned.row.end + 1 - planned.sequence.num_prompt
        right_ids = self.answers.get(planned.sequence.request, [])[start : start + len(token_ids)]
        if len(right_ids) < len(token_ids) or self.chance.random() >= self.right_draft_probability:
            return token_ids
        return tuple(right_ids)


def make_stages(
    checkpoint: Checkpoint, head: Path | None, num_stages: int, mode: DraftMode, right_draft_probability: float = 0.0
) -> PipelinedStages:
    """Return stages with a scheduler of 3 slots."""
    limits = SchedulerLimits(3, CONTEXT_TOKENS, CHUNK_TOKENS, num_stages)
    scheduler = Scheduler(limits, FixedStepPolicy(2, CHUNK_TOKENS, CHUNK_TOKENS // 4), draft_mode=mode)
    return PipelinedStages(
        Pipeline(checkpoint("thinking"), num_stages, 3, head),
        scheduler,
        right_draft_probability=right_draft_probability,
    )


def head_cache_rows(stages: PipelinedStages, count: int) -> list[mx.array]:
    """Return the head's cache rows of positions 1 to ``count`` - 1 in each used slot. Nothing reads row 0."""
    assert stages.pipeline.head is not None
    return [array[1:count] for array in stages.pipeline.head.cache.arrays]


@pytest.mark.slow
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_a_head_changes_no_token_and_no_logprob_of_any_request(
    checkpoint: Checkpoint, head: Path, num_stages: int
) -> None:
    """Drafts are right, wrong, in flight when a request ends, undone, or part of a prefix that is used again.

    With one stage no draft is in flight.
    """
    plain = make_stages(checkpoint, None, num_stages, DraftMode.OFF)
    with_head = make_stages(checkpoint, head, num_stages, DraftMode.OFF)
    drafting = make_stages(checkpoint, head, num_stages, DraftMode.MODEL, right_draft_probability=0.6)
    for case in request_cases(num_stages, NUM_CASES):
        expected = plain.run(case)
        drafting.answers = {
            request: [token.token_id for token in tokens]
            for request, tokens in zip((case.request, case.companion), expected, strict=False)
            if request is not None
        }
        assert with_head.run(case) == expected
        assert drafting.run(case) == expected
    if num_stages > 1:
        assert drafting.num_accepted > NUM_CASES  # drafts were right ...
        assert drafting.num_skipped > NUM_CASES // 4  # ... and wrong


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cache_rows_after_wrong_and_right_drafts_equal_those_of_a_run_without_drafts(
    checkpoint: Checkpoint, head: Path, num_stages: int, temperature: float
) -> None:
    prompt = prompt_of(50)
    num_tokens = 14
    case = RequestCase(Request(prompt, num_tokens, Sampling(seed=3, temperature=temperature), frozenset()))
    undrafted = make_stages(checkpoint, head, num_stages, DraftMode.OFF)
    (expected,) = undrafted.run(case)
    drafting = make_stages(checkpoint, head, num_stages, DraftMode.MODEL, right_draft_probability=0.5)
    drafting.answers = {case.request: [token.token_id for token in expected]}
    assert drafting.run(case) == [expected]
    assert drafting.num_skipped > 2  # several drafts were wrong ...
    assert drafting.num_accepted > 2  # ... and several were right
    num_computed = len(prompt) + num_tokens - 1  # without drafts the last token's position is not computed
    (rows,), (undrafted_rows,) = head_cache_rows(drafting, num_computed), head_cache_rows(undrafted, num_computed)
    assert mx.array_equal(rows, undrafted_rows)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_right_drafts_in_flight_do_not_change_the_drafts_after_a_step(
    checkpoint: Checkpoint, head: Path, num_stages: int
) -> None:
    results: list[tuple[int, tuple[int, ...]]] = []  # the sampled token and its drafts
    for has_plans_in_flight in (False, True):
        pipeline = Pipeline(checkpoint("thinking"), num_stages, 2, head)
        first = prompt_row(num_drafts=3)
        steps = [Step(0, (first,))]
        if has_plans_in_flight:  # with the token that will be sampled, and the first draft after it
            token_id, draft_ids = results[0]
            steps.append(Step(1, (token_row(token_id, position=NUM_PROMPT),)))
            steps.append(Step(2, (token_row(draft_ids[0], position=NUM_PROMPT + 1),)))
        for step in steps:
            pipeline.expect(step)
        answers = [runner.run(steps[0]) for runner in pipeline.runners]
        drafted = pipeline.runners[-1].draft()
        assert drafted is not None
        assert len(drafted.token_ids) == 3
        results.append((answers[-1].tokens[0].token_id, drafted.token_ids))
    assert results[0] == results[1]


def test_the_first_draft_is_the_draft_token_that_is_in_flight(checkpoint: Checkpoint, head: Path) -> None:
    first = prompt_row(num_drafts=2)
    pipeline = Pipeline(checkpoint("thinking"), 1, 2, head)
    (done,) = pipeline.step(first)
    drafted = pipeline.runners[0].draft()
    token_id = done.tokens[0].token_id
    assert drafted is not None
    other_id = (drafted.token_ids[0] + 1) % 500
    pipeline = Pipeline(checkpoint("thinking"), 1, 2, head)
    pipeline.expect(Step(1, (token_row(token_id, position=NUM_PROMPT),)))
    pipeline.expect(Step(2, (token_row(other_id, position=NUM_PROMPT + 1),)))
    (done,) = pipeline.step(first)
    assert done.number == 1
    drafted = pipeline.runners[0].draft()
    assert drafted is not None
    assert drafted.token_ids[0] == other_id  # without a plan in flight the head drafts another token


def test_the_last_stage_skips_a_wrong_draft_and_all_stages_skip_a_draft_that_a_later_plan_undoes(
    checkpoint: Checkpoint, head: Path
) -> None:
    pipeline = Pipeline(checkpoint("thinking"), 3, 2, head)
    (token,) = pipeline.tokens(prompt_row())
    wrong = token_row((token.token_id + 1) % 500, position=NUM_PROMPT)
    answers = pipeline.step(wrong)
    assert [done.is_skipped for done in answers] == [False, False, True]
    assert answers[-1].tokens == ()
    pipeline.expect(Step(3, (wrong,)))
    pipeline.expect(Step(4, (token_row(token.token_id, position=NUM_PROMPT, is_draft=False),)))
    assert [done.is_skipped for done in pipeline.step(wrong)] == [True, True, True]
    (next_token,) = pipeline.tokens(token_row(token.token_id, position=NUM_PROMPT, is_draft=False))
    expected = Pipeline(checkpoint("thinking"), 1).generate(prompt_of(NUM_PROMPT), GREEDY, 2)
    assert [token.token_id, next_token.token_id] == [sampled.token_id for sampled in expected]


def test_a_hop_has_a_second_vector_for_each_token_only_with_a_head(checkpoint: Checkpoint, head: Path) -> None:
    for head_folder, shape in ((None, (5, 128)), (head, (10, 128))):
        pipeline = Pipeline(checkpoint("thinking"), 2, 2, head_folder)
        pipeline.runners[0].run(
            Step(1, (Row(slot=0, position=0, token_ids=prompt_of(5), is_prompt=True, sampling=None),))
        )
        assert pipeline.hops[1].get_nowait().shape == shape
