"""Tests of the built-in model's draft head over real stages: tokens are the same as on one stage without the head."""

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
from tests.coordinator.schemas import answer_constraint
from tests.local_cluster import marked_host, rest_of, stage_process
from training.conversation import render_prompt
from training.data import Question, held_out
from training.vocabulary import load_encoding

IS_LONG = hypothesis.settings.get_current_profile_name() == "long"
VOCAB_SIZE = 2048
NUM_TEXT_TOKENS = 1792
"""Number of tokens with text. The ids of control tokens follow."""
NUM_CASES = 400 if IS_LONG else 8
CONTEXT_TOKENS = 1024
QUESTIONS = held_out().questions
HEAD = DraftHead(source=ModelSource(path_or_repo=BUILTIN_HEAD), bits=8)
TOKENIZER = load_tokenizer(read_model_files(ModelSource(path_or_repo=BUILTIN)).files, VOCAB_SIZE)
STOP_IDS = frozenset({TOKENIZER.token_id("<|im_end|>")})
EngineOf = Callable[[int], Engine]


def builtin_deployment_request(hostfile: Hostfile, draft_head: DraftHead | None) -> DeploymentRequest:
    source = ModelSource(path_or_repo=BUILTIN)
    options = ClusterOptions(context_tokens=CONTEXT_TOKENS, dtype="float32")
    return DeploymentRequest(options, hostfile, source, num_slots=2, draft_head=draft_head)


@pytest.fixture(scope="module")
def engine_of() -> Iterator[EngineOf]:
    """Yield a function from a number of stages to an engine. One stage has no draft head, several have it."""
    with ExitStack() as stack:

        def start(num_stages: int) -> Engine:
            hostfile = local_hostfile(num_stages)
            deployment_request = builtin_deployment_request(hostfile, HEAD if num_stages > 1 else None)
            deployment = stack.enter_context(deploy(*open_source(deployment_request), DeploymentListener()))
            mode = DraftMode.MODEL if num_stages > 1 else DraftMode.OFF
            return stack.enter_context(engine_on(deployment, draft_mode=mode))

        yield cache(start)


def prompt_of(question: Question) -> tuple[int, ...]:
    """Return the token ids of a question as the template renders it."""
    encoding = load_encoding(BUILTIN_FOLDER / "tiktoken.model")
    text = render_prompt(question.conversation, question.num_steps)
    return tuple(encoding.encode(text, allowed_special="all"))


def random_sampling(rng: random.Random, seed: int) -> Sampling:
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
    """Return the tokens of three answers: to a prompt, to prompt + answer + random tokens, and again to the prompt.

    The second request continues in the first one's slot. The third copies the prompt from that slot, or runs in it.
    """
    prompt_ids = prompt_of(rng.choice(QUESTIONS))
    first_answer = answer(engine, Request(prompt_ids, 40, random_sampling(rng, seed), STOP_IDS))
    added_ids = [rng.randrange(NUM_TEXT_TOKENS) for _ in range(rng.choice([1, 8, 70]))]
    continuation = Request((*prompt_ids, *first_answer, *added_ids), 24, random_sampling(rng, seed), frozenset())
    second_answer = answer(engine, continuation)
    third_answer = answer(engine, Request(prompt_ids, 24, random_sampling(rng, seed + 1), frozenset()))
    return [first_answer, second_answer, third_answer]


def answer(engine: Engine, request: Request) -> list[int]:
    return rest_of(engine.submit(request))[0]


@pytest.mark.slow
@pytest.mark.timeout(3000 if IS_LONG else 120)
@pytest.mark.parametrize("num_stages", [2, 3])
def test_the_tokens_of_random_requests_are_the_same_with_the_head(engine_of: EngineOf, num_stages: int) -> None:
    for seed in range(NUM_CASES):
        expected = three_answers(engine_of(1), random.Random(seed), seed)
        assert three_answers(engine_of(num_stages), random.Random(seed), seed) == expected, f"seed {seed}"


@pytest.mark.timeout(60)
def test_drafts_of_the_head_are_accepted_and_an_answer_has_the_same_tokens_after_a_cancelled_one(
    engine_of: EngineOf,
) -> None:
    request = Request(prompt_of(QUESTIONS[250]), 60, Sampling(seed=3, temperature=0.0), STOP_IDS)
    expected = answer(engine_of(1), request)
    cancelled = engine_of(2).submit(Request(prompt_of(QUESTIONS[700]), 60, Sampling(seed=1), frozenset()))
    for num_events, event in enumerate(cancelled.events()):
        if isinstance(event, Token) and num_events > 5:  # while drafts are in flight
            cancelled.cancel()
    token_ids, end = rest_of(engine_of(2).submit(request))
    assert token_ids == expected
    (drafts,) = end.summary.drafts
    assert drafts.source is DraftSource.MODEL
    assert drafts.num_accepted > 0.5 * len(expected)


WORDS = {"type": "string", "pattern": "^[a-z ]{1,24}$"}
SCHEMA = {
    "type": "object",
    "properties": {"city": WORDS, "kind": {"enum": ["capital", "village"]}, "words": {"type": "array", "items": WORDS}},
    "required": ["city", "kind", "words"],
    "additionalProperties": False,
}
GRAMMAR = compile_constraint(GrammarCompiler(TOKENIZER), answer_constraint(SCHEMA))


def constrained_answer(engine: Engine, rng: random.Random, seed: int) -> tuple[list[int], Finished]:
    """Return the tokens and the end of an answer with a grammar, a thinking budget and a minimum length."""
    request = Request(prompt_of(rng.choice(QUESTIONS)), 60, random_sampling(rng, seed), STOP_IDS)
    limits = ReplyLimits(min_tokens=rng.choice([0, 40]), thinking_budget=rng.choice([None, 0, 9]))
    return rest_of(engine.submit(request, ReplyPolicy(TOKENIZER, request, limits, GRAMMAR)))


@pytest.mark.timeout(3000 if IS_LONG else 120)
@pytest.mark.parametrize("num_stages", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_tokens_of_constrained_answers_are_the_same_with_the_head(engine_of: EngineOf, num_stages: int) -> None:
    num_accepted = 0
    for seed in range(NUM_CASES // 4):
        expected, _ = constrained_answer(engine_of(1), random.Random(seed), seed)
        token_ids, end = constrained_answer(engine_of(num_stages), random.Random(seed), seed)
        assert token_ids == expected, f"seed {seed}"
        num_accepted += end.summary.accepted
    assert num_accepted > NUM_CASES  # on average more than 4 drafts in an answer


@pytest.mark.slow
def test_an_answer_with_drafts_continues_with_the_same_tokens_after_each_stage_was_killed(
    engine_of: EngineOf, tmp_path: Path
) -> None:
    request = Request(prompt_of(QUESTIONS[250]), 60, Sampling(seed=3, temperature=1.0), frozenset())
    hosts = tuple(marked_host(tmp_path, rank, sys.executable) for rank in range(2))
    deployment_request = builtin_deployment_request(Hostfile(hosts=hosts, backend=Backend.RING), HEAD)
    with (
        RestartingDeployment(
            *open_source(deployment_request), DeploymentListener(), limit=5, first_wait_s=0.05
        ) as restarting,
        engine_on(restarting.deployment, draft_mode=DraftMode.MODEL, restarts=restarting) as engine,
    ):
        token_ids = []
        for event in engine.submit(request).events():
            if isinstance(event, Token):
                token_ids.append(event.token_id)
                if len(token_ids) == 10:
                    stage_process(0).kill()
                elif len(token_ids) == 30:
                    stage_process(1).kill()
    assert isinstance(event, Finished)
    assert event.summary.accepted > 0
    assert token_ids == answer(engine_of(1), request)
