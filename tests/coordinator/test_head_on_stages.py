"""Tests of the built-in model's draft head over real stages: the tokens are those of one stage without a head."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import hypothesis
import pytest

from mlx_k2.builtin import BUILTIN_FOLDER
from mlx_k2.cluster.hostfile import Backend, Hostfile, local_hostfile
from mlx_k2.coordinator.engine import Engine, engine_on
from mlx_k2.coordinator.handle import Finished, Token
from mlx_k2.coordinator.reply_policy import ReplyLimits, ReplyPolicy
from mlx_k2.deployment.cluster_options import ClusterOptions, DeploymentRequest, open_source
from mlx_k2.deployment.deploy import deploy
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.deployment.restarting import RestartingDeployment
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.drafts import DraftSource
from mlx_k2.scheduling.request import Request
from mlx_k2.text.grammar import GrammarCompiler
from mlx_k2.text.reply_grammar import compile_constraint
from mlx_k2.text.tokenizer import load_tokenizer
from mlx_k2.weights.model_files import read_model_files
from mlx_k2.weights.model_source import BUILTIN, BUILTIN_HEAD, DraftHead, ModelSource
from tests.coordinator.schemas import answer_of
from tests.local_cluster import marked_host, rest_of, stage_process
from training.conversation import render_prompt
from training.data import Question, held_out
from training.vocabulary import load_encoding

IS_LONG = hypothesis.settings.get_current_profile_name() == "long"
NUM_TEXT_TOKENS = 1792
"""Ids of ordinary tokens; those of control tokens follow."""
NUM_CASES = 400 if IS_LONG else 8
CONTEXT_TOKENS = 1024
EngineOf = Callable[[int], Engine]


def builtin_request(hostfile: Hostfile, head: DraftHead | None) -> DeploymentRequest:
    source = ModelSource(path_or_repo=BUILTIN)
    options = ClusterOptions(context_tokens=CONTEXT_TOKENS, dtype="float32")
    return DeploymentRequest(options, hostfile, source, num_slots=2, draft_head=head)


HEAD = DraftHead(source=ModelSource(path_or_repo=BUILTIN_HEAD), bits=8)


@pytest.fixture(scope="module")
def engine_of() -> Iterator[EngineOf]:
    """Yield a function from a number of stages to an engine. One stage has no head."""
    with ExitStack() as stack:

        def start(num_stages: int) -> Engine:
            request = builtin_request(local_hostfile(num_stages), HEAD if num_stages > 1 else None)
            deployment = stack.enter_context(deploy(*open_source(request), DeploymentListener()))
            mode = DraftMode.MODEL if num_stages > 1 else DraftMode.OFF
            return stack.enter_context(engine_on(deployment, draft_mode=mode))

        yield cache(start)


def prompt_ids(question: Question) -> tuple[int, ...]:
    encoding = load_encoding(BUILTIN_FOLDER / "tiktoken.model")
    text = render_prompt(question.conversation, question.num_steps)
    return tuple(encoding.encode(text, allowed_special="all"))


STOP_ID = load_encoding(BUILTIN_FOLDER / "tiktoken.model").encode_single_token("<|im_end|>")
QUESTIONS = held_out().questions


def sampling_of(rng: random.Random, seed: int) -> Sampling:
    """Return random parameters: greedy or sampled, with some of the filters, penalties and biases."""
    return Sampling(
        seed=seed,
        temperature=rng.choice([0.0, 0.7, 1.0, 1.0]),
        top_p=rng.choice([1.0, 1.0, 0.8]),
        top_k=rng.choice([None, None, 5]),
        min_p=rng.choice([0.0, 0.0, 0.1]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        presence_penalty=rng.choice([0.0, 0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.3]),
        logit_bias=rng.choice([(), (), ((rng.randrange(NUM_TEXT_TOKENS), rng.uniform(-3, 3)),)]),
    )


def three_answers(engine: Engine, rng: random.Random, seed: int) -> list[list[int]]:
    """Return the tokens of an answer, then of one that continues it, then of the first prompt with another seed.

    The second request continues in the first one's slot. The third uses the prompt in that slot, or copies it from
    there.
    """
    first_prompt = prompt_ids(rng.choice(QUESTIONS))
    answers = [answer_tokens(engine, Request(first_prompt, 40, sampling_of(rng, seed), frozenset({STOP_ID})))]
    added_ids = (rng.randrange(NUM_TEXT_TOKENS) for _ in range(rng.choice([1, 8, 70])))
    longer_prompt = (*first_prompt, *answers[0], *added_ids)
    answers.append(answer_tokens(engine, Request(longer_prompt, 24, sampling_of(rng, seed), frozenset())))
    answers.append(answer_tokens(engine, Request(first_prompt, 24, sampling_of(rng, seed + 1), frozenset())))
    return answers


def answer_tokens(engine: Engine, request: Request) -> list[int]:
    return rest_of(engine.submit(request))[0]


@pytest.mark.slow
@pytest.mark.timeout(3000 if IS_LONG else 120)
@pytest.mark.parametrize("num_stages", [2, 3])
def test_the_tokens_of_random_requests_are_the_same_with_the_head(engine_of: EngineOf, num_stages: int) -> None:
    for number in range(NUM_CASES):
        without_head = three_answers(engine_of(1), random.Random(number), number)
        with_head = three_answers(engine_of(num_stages), random.Random(number), number)
        assert with_head == without_head, f"case {number}"


@pytest.mark.timeout(60)
def test_drafts_of_the_head_are_accepted_and_an_answer_has_the_same_tokens_after_a_cancelled_one(
    engine_of: EngineOf,
) -> None:
    request = Request(prompt_ids(QUESTIONS[250]), 60, Sampling(seed=3, temperature=0.0), frozenset({STOP_ID}))
    without_head = answer_tokens(engine_of(1), request)
    cancelled = engine_of(2).submit(Request(prompt_ids(QUESTIONS[700]), 60, Sampling(seed=1), frozenset()))
    for number, event in enumerate(cancelled.events()):
        if isinstance(event, Token) and number > 5:
            cancelled.cancel()
    token_ids, end = rest_of(engine_of(2).submit(request))
    assert token_ids == without_head
    assert isinstance(end, Finished)
    (count,) = end.summary.drafts
    assert count.source is DraftSource.MODEL
    assert count.num_accepted > 0.5 * len(token_ids)


WORDS = {"type": "string", "pattern": "^[a-z ]{1,24}$"}
SCHEMA = {
    "type": "object",
    "properties": {"city": WORDS, "kind": {"enum": ["capital", "village"]}, "words": {"type": "array", "items": WORDS}},
    "required": ["city", "kind", "words"],
    "additionalProperties": False,
}
TOKENIZER = load_tokenizer(read_model_files(ModelSource(path_or_repo=BUILTIN)).files, 2048)
GRAMMAR = compile_constraint(GrammarCompiler(TOKENIZER), answer_of(SCHEMA))


def constrained_answer(engine: Engine, rng: random.Random, seed: int) -> tuple[list[int], Finished]:
    """Return the tokens of an answer that a grammar, a thinking budget and a minimum length constrain, and its end."""
    request = Request(prompt_ids(rng.choice(QUESTIONS)), 60, sampling_of(rng, seed), frozenset({STOP_ID}))
    limits = ReplyLimits(min_tokens=rng.choice([0, 40]), thinking_budget=rng.choice([None, 0, 9]))
    return rest_of(engine.submit(request, ReplyPolicy(TOKENIZER, request, limits, GRAMMAR)))


@pytest.mark.timeout(3000 if IS_LONG else 120)
@pytest.mark.parametrize("num_stages", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_tokens_of_constrained_answers_are_the_same_with_the_head(engine_of: EngineOf, num_stages: int) -> None:
    num_accepted = 0
    for number in range(NUM_CASES // 4):
        without_head, _ = constrained_answer(engine_of(1), random.Random(number), number)
        with_head, end = constrained_answer(engine_of(num_stages), random.Random(number), number)
        assert with_head == without_head, f"case {number}"
        num_accepted += sum(count.num_accepted for count in end.summary.drafts)
    assert num_accepted > NUM_CASES


@pytest.mark.slow
def test_an_answer_with_drafts_continues_with_the_same_tokens_after_each_stage_is_killed(
    engine_of: EngineOf, tmp_path: Path
) -> None:
    request = Request(prompt_ids(QUESTIONS[250]), 60, Sampling(seed=3, temperature=1.0), frozenset())
    hosts = tuple(marked_host(tmp_path, rank, sys.executable) for rank in range(2))
    deployment_request = builtin_request(Hostfile(hosts=hosts, backend=Backend.RING), HEAD)
    with (
        RestartingDeployment(
            *open_source(deployment_request), DeploymentListener(), limit=5, first_wait_s=0.05
        ) as restarting,
        engine_on(restarting.deployment, draft_mode=DraftMode.MODEL, restarts=restarting) as engine,
    ):
        token_ids, stage_to_kill_at = [], {10: 0, 30: 1}
        for event in engine.submit(request).events():
            if isinstance(event, Token):
                token_ids.append(event.token_id)
                if len(token_ids) in stage_to_kill_at:
                    stage_process(stage_to_kill_at[len(token_ids)]).kill()
    assert isinstance(event, Finished)
    assert event.summary.accepted > 0
    assert token_ids == answer_tokens(engine_of(1), request)
