"""Tests of a draft head on real layers, in float32 on a CPU: plans in flight, text, cache rows, skipped plans."""

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
NUM_REQUESTS = 150 if hypothesis.settings.get_current_profile_name() == "long" else 12
"""For each number of stages."""


@pytest.fixture(scope="module")
def head(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads") / "head"
    fields = draft_config_fields(VARIANTS["thinking"], draft_vocab_size=300)
    write_random_draft_head(folder, fields, read_config(checkpoint("thinking")), 5, own=(LM_HEAD,))
    return folder


@dataclass
class Asked:
    """A request, the number of tokens after which it is cancelled, and the other that runs beside it, if any."""

    request: Request
    cancel_after: int | None
    beside: Request | None


def requests(seed: int, count: int) -> list[Asked]:
    """Return requests of all kinds: many begin alike, so that prefixes are taken over or copied."""
    chance = random.Random(seed)
    beginning = tuple(chance.randrange(500) for _ in range(60))

    def one(index: int) -> Request:
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

    return [
        Asked(
            one(2 * index),
            chance.choice([None, None, None, chance.randint(1, 5)]),
            one(2 * index + 1) if chance.random() < 0.2 else None,
        )
        for index in range(count)
    ]


@dataclass
class InFlight:
    """Stages that each hold plans, as processes do: a draft is on its way before its token is known.

    ``right`` has the answers; the drafts of the head are replaced by the right ones with probability ``acceptance``.
    """

    pipeline: Pipeline
    scheduler: Scheduler
    right: dict[Request, list[int]] = field(default_factory=dict)
    acceptance: float = 0.0
    num_skipped: int = 0
    num_accepted: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(2))

    def __post_init__(self) -> None:
        self._waiting: list[deque[Step]] = [deque() for _ in self.pipeline.runners]
        self._microbatches: dict[int, Microbatch] = {}

    def run(self, asked: Asked) -> list[list[SampledToken]]:
        """Run a request, and the one beside it; return the tokens of each."""
        found: dict[int, list[SampledToken]] = {}
        sequences = []
        for request in (asked.request, asked.beside):
            if request is not None:
                sequences.append(self.scheduler.submit(request).sequence)
                found[id(sequences[-1])] = []
        while self.scheduler.has_work:
            self._send()
            for done in self._tick():
                for added in self._complete(done):
                    found[id(added[0])] += added[1]
            if asked.cancel_after is not None and len(found[id(sequences[0])]) >= asked.cancel_after:
                self.scheduler.stop(sequences[0], FinishReason.CANCELLED)
        self.num_accepted += sum(count.num_accepted for each in sequences for count in each.drafts.counts)
        return list(found.values())

    def _send(self) -> None:
        while (microbatch := self.scheduler.next_microbatch()) is not None:
            step = Step(microbatch.number, tuple(planned.row for planned in microbatch.rows))
            self._microbatches[microbatch.number] = microbatch
            self.pipeline.expect(step)
            self._waiting[0].append(step)

    def _tick(self) -> Iterator[StepDone]:
        """Let every stage run one step, the last stage first; yield its answer."""
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
        microbatch = self._microbatches.pop(done.number)
        self.num_skipped += done.is_skipped
        completed = self.scheduler.complete(done.number, done.tokens, is_skipped=done.is_skipped)
        drafted = self.pipeline.runners[-1].draft()
        request = microbatch.rows[0].row.draft
        assert (drafted is not None) == (request is not None and not done.is_skipped and self.pipeline.head is not None)
        if drafted is not None:
            self.scheduler.propose(microbatch, self._replaced(microbatch, drafted.token_ids))
        for added in completed:
            yield added.sequence, [appended.token for appended in added.tokens]

    def _replaced(self, microbatch: Microbatch, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        (planned,) = microbatch.rows
        start = planned.row.end + 1 - planned.sequence.num_prompt
        right = self.right.get(planned.sequence.request, [])[start : start + len(token_ids)]
        if len(right) < len(token_ids) or self.chance.random() >= self.acceptance:
            return token_ids
        return tuple(right)


def in_flight(
    checkpoint: Checkpoint, head: Path | None, num_stages: int, mode: DraftMode, acceptance: float = 0.0
) -> InFlight:
    limits = SchedulerLimits(3, CONTEXT_TOKENS, CHUNK_TOKENS, num_stages)
    scheduler = Scheduler(limits, FixedStepPolicy(2, CHUNK_TOKENS, CHUNK_TOKENS // 4), draft_mode=mode)
    return InFlight(Pipeline(checkpoint("thinking"), num_stages, 3, head), scheduler, acceptance=acceptance)


def rows_of(stages: InFlight, count: int) -> list[mx.array]:
    """Return the head's cache rows of each slot, as far as ``count`` positions."""
    assert stages.pipeline.head is not None
    return [array[1:count] for array in stages.pipeline.head.cache.arrays]


@pytest.mark.slow
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_a_head_changes_no_token_and_no_cache_row_for_any_request(
    checkpoint: Checkpoint, head: Path, num_stages: int
) -> None:
    """Whatever the drafts are: right, wrong, in flight when a request ends, undone, in a prefix that another takes."""
    plain = in_flight(checkpoint, None, num_stages, DraftMode.OFF)
    writing = in_flight(checkpoint, head, num_stages, DraftMode.OFF)
    drafting = in_flight(checkpoint, head, num_stages, DraftMode.MODEL, acceptance=0.6)
    for asked in requests(num_stages, NUM_REQUESTS):
        expected = plain.run(asked)
        drafting.right = {
            request: [token.token_id for token in tokens]
            for request, tokens in zip((asked.request, asked.beside), expected, strict=False)
            if request is not None
        }
        assert writing.run(asked) == expected
        assert drafting.run(asked) == expected
    if num_stages > 1:
        assert drafting.num_accepted > NUM_REQUESTS
        assert drafting.num_skipped > NUM_REQUESTS // 4


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cache_rows_after_wrong_and_right_drafts_are_those_of_a_fresh_run(
    checkpoint: Checkpoint, head: Path, num_stages: int, temperature: float
) -> None:
    prompt = tuple((31 * at) % 500 for at in range(50))
    asked = Asked(Request(prompt, 14, Sampling(seed=3, temperature=temperature), frozenset()), None, None)
    fresh = in_flight(checkpoint, head, num_stages, DraftMode.OFF)
    (expected,) = fresh.run(asked)
    drafting = in_flight(checkpoint, head, num_stages, DraftMode.MODEL, acceptance=0.5)
    drafting.right = {asked.request: [token.token_id for token in expected]}
    assert drafting.run(asked) == [expected]
    assert drafting.num_skipped > 2
    assert drafting.num_accepted > 2
    computed = len(prompt) + 13  # the last token's position is never computed without drafts
    (ours,), (theirs,) = rows_of(drafting, computed), rows_of(fresh, computed)
    assert mx.array_equal(ours, theirs)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_drafts_are_the_same_for_any_stages_and_follow_those_in_flight(
    checkpoint: Checkpoint, head: Path, num_stages: int
) -> None:
    prompt = tuple((31 * at) % 500 for at in range(30))
    sampling = Sampling(seed=3, temperature=0)
    found: list[tuple[int, tuple[int, ...]]] = []
    for in_plans in (False, True):
        pipeline = Pipeline(checkpoint("thinking"), num_stages, 2, head)
        first = Row(0, 0, prompt, True, sampling, prompt, draft=DraftRequest(3))
        steps = [Step(0, (first,))]
        if in_plans:  # the token that will be sampled, and the first draft after it
            token_id, draft = found[0]
            steps += [Step(1, (Row(0, 30, (token_id,), False, sampling, is_draft=True),))]
            steps += [Step(2, (Row(0, 31, (draft[0],), False, sampling, is_draft=True),))]
        for step in steps:
            pipeline.expect(step)
        done = [runner.run(steps[0]) for runner in pipeline.runners]
        drafted = pipeline.runners[-1].draft()
        assert drafted is not None
        assert len(drafted.token_ids) == 3
        found.append((done[-1].tokens[0].token_id, drafted.token_ids))
    assert found[0] == found[1]


def test_a_draft_keeps_the_token_that_is_in_flight_and_follows_it(checkpoint: Checkpoint, head: Path) -> None:
    prompt = tuple((31 * at) % 500 for at in range(30))
    sampling = Sampling(seed=3, temperature=0)
    first = Row(0, 0, prompt, True, sampling, prompt, draft=DraftRequest(2))
    alone = Pipeline(checkpoint("thinking"), 1, 2, head)
    (done,) = alone.step(first)
    plain = alone.runners[0].draft()
    token_id = done.tokens[0].token_id
    assert plain is not None
    other = (plain.token_ids[0] + 1) % 500
    pipeline = Pipeline(checkpoint("thinking"), 1, 2, head)
    pipeline.expect(Step(1, (Row(0, 30, (token_id,), False, sampling, is_draft=True),)))
    pipeline.expect(Step(2, (Row(0, 31, (other,), False, sampling, is_draft=True),)))
    pipeline.step(first)
    drafted = pipeline.runners[0].draft()
    assert drafted is not None
    assert drafted.token_ids[0] == other


def test_a_wrong_draft_is_not_computed_by_the_last_stage_and_an_undone_one_by_none(
    checkpoint: Checkpoint, head: Path
) -> None:
    prompt = tuple((31 * at) % 500 for at in range(30))
    sampling = Sampling(seed=3, temperature=0)
    pipeline = Pipeline(checkpoint("thinking"), 3, 2, head)
    (token,) = pipeline.tokens(Row(0, 0, prompt, True, sampling, prompt))
    wrong = Row(0, 30, ((token.token_id + 1) % 500,), False, sampling, is_draft=True)
    answers = pipeline.step(wrong)
    assert [done.is_skipped for done in answers] == [False, False, True]
    assert answers[-1].tokens == ()
    pipeline.expect(Step(3, (wrong,)))
    pipeline.expect(Step(4, (Row(0, 30, (token.token_id,), False, sampling),)))
    assert [done.is_skipped for done in pipeline.step(wrong)] == [True, True, True]
    (after,) = pipeline.tokens(Row(0, 30, (token.token_id,), False, sampling))
    straight = Pipeline(checkpoint("thinking"), 1)
    expected = straight.generate(prompt, sampling, 2)
    assert [token.token_id, after.token_id] == [one.token_id for one in expected]


def test_the_hop_has_one_more_vector_per_token_only_with_a_head(checkpoint: Checkpoint, head: Path) -> None:
    prompt = tuple(range(5))
    for folder, expected in ((None, (5, 128)), (head, (10, 128))):
        pipeline = Pipeline(checkpoint("thinking"), 2, 2, folder)
        pipeline.runners[0].run(Step(1, (Row(0, 0, prompt, True, None),)))
        hop = pipeline.hops[1].get_nowait()
        assert hop.shape == expected
