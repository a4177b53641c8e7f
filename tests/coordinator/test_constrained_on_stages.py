"""Tests of constrained replies over real stages: they are the same with and without drafts, over 1, 2 and 3 stages."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import msgspec
import pytest

from mlx_k2.coordinator.handle import Finished, Handle, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.coordinator.reply_policy import NO_LIMITS, ReplyLimits, ReplyPolicy
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.text.constraint import AnswerForm, AnswerFormat, Constraint
from mlx_k2.text.grammar import GrammarCompiler
from mlx_k2.text.reply_grammar import compile_constraint
from mlx_k2.text.reply_parts import Part, whole_reply
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer
from tests.coordinator.constrained import GeneratedReply
from tests.coordinator.schemas import answer_constraint, call_constraint
from tests.coordinator.test_schemas import check
from tests.local_cluster import VOCAB_SIZE, Cluster, local_cluster, local_host, rest_of, write_model

CONTEXT_TOKENS = 1024
REPETITIVE_SCHEMA = {
    "type": "object",
    "properties": {
        "names": {"type": "array", "items": {"enum": ["anna", "anton"]}, "minItems": 12, "maxItems": 12},
        "more": {"type": "string", "maxLength": 20},
    },
    "required": ["names", "more"],
    "additionalProperties": False,
}
"""Its answers repeat names, so that some drafts are right."""
ClusterOf = Callable[[int], Cluster]


@pytest.fixture(scope="module")
def cluster_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterOf]:
    """Yield a function from a number of stages to a cluster. One stage runs without drafts, several with."""
    folder = write_model(tmp_path_factory.mktemp("model") / "tiny", CONTEXT_TOKENS)
    with ExitStack() as stack:

        def start(num_stages: int) -> Cluster:
            hosts = [local_host()] * num_stages
            return stack.enter_context(
                local_cluster(folder, hosts, drafts=num_stages > 1, context_tokens=CONTEXT_TOKENS)
            )

        yield cache(start)


@pytest.fixture(scope="module")
def compiler(cluster_of: ClusterOf) -> GrammarCompiler:
    return GrammarCompiler(load_tokenizer(cluster_of(1).deployment.model.files, VOCAB_SIZE))


def instant_request(tokenizer: Tokenizer, seed: int, max_tokens: int, ending_bias: float) -> Request:
    """Return a request whose reply has no reasoning. ``ending_bias`` is for tokens that can end a JSON value."""
    stop_id = tokenizer.token_id("<|im_end|>")
    ending_ids = [
        token_id for token_id in range(VOCAB_SIZE) if tokenizer.token_bytes(token_id)[:1] in (b'"', b"}", b"]", b",")
    ]
    biases = tuple((token_id, ending_bias) for token_id in ending_ids)
    prompt_ids = (stop_id, seed % 200, tokenizer.token_id("<think>"), tokenizer.token_id("</think>"))
    return Request(prompt_ids, max_tokens, Sampling(seed=seed, logit_bias=biases), frozenset({stop_id}))


def submission(
    compiler: GrammarCompiler, constraint: Constraint, request: Request, limits: ReplyLimits = NO_LIMITS
) -> Submission:
    grammar = compile_constraint(compiler, constraint)
    return Submission(request, ReplyPolicy(compiler.tokenizer, request, limits, grammar))


def reply_of(handle: Handle) -> GeneratedReply:
    token_ids: list[int] = []
    parts: list[Part] = []
    for event in handle.events():
        if isinstance(event, Token):
            token_ids.append(event.token_id)
        if isinstance(event, Token | Finished):
            parts += event.parts
    assert isinstance(event, Finished)
    return GeneratedReply(token_ids, whole_reply(parts), event.reason)


@pytest.mark.slow
def test_replies_are_the_same_over_1_stage_without_drafts_and_over_2_and_3_stages_with_drafts(
    cluster_of: ClusterOf, compiler: GrammarCompiler
) -> None:
    plain = instant_request(compiler.tokenizer, seed=5, max_tokens=600, ending_bias=20.0)
    penalties = msgspec.structs.replace(plain.sampling, presence_penalty=0.5, frequency_penalty=0.1)
    for constraint in (
        answer_constraint(REPETITIVE_SCHEMA),
        call_constraint(REPETITIVE_SCHEMA, is_parallel=False),
        Constraint(AnswerFormat(AnswerForm.REGEX, "(ab|cd|ef|gh){30,60}")),
    ):
        for request in (plain, replace(plain, sampling=penalties)):
            one, two, three = (
                reply_of(*cluster_of(num_stages).engine.submit_all([submission(compiler, constraint, request)]))
                for num_stages in (1, 2, 3)
            )
            assert one == two == three
            assert one.finish_reason is FinishReason.STOP


def test_drafts_are_accepted_in_a_constrained_answer(cluster_of: ClusterOf, compiler: GrammarCompiler) -> None:
    request = instant_request(compiler.tokenizer, seed=5, max_tokens=400, ending_bias=5.0)
    constrained = submission(compiler, answer_constraint(REPETITIVE_SCHEMA), request)
    _, end = rest_of(*cluster_of(2).engine.submit_all([constrained]))
    assert end.summary.drafted >= end.summary.accepted > 0


def test_constrained_and_free_replies_run_side_by_side(cluster_of: ClusterOf, compiler: GrammarCompiler) -> None:
    free = Request((1, 2, 3), 40, Sampling(seed=1), frozenset())
    tokens_alone = cluster_of(2).tokens(free)[free]
    request = instant_request(compiler.tokenizer, seed=3, max_tokens=200, ending_bias=20.0)
    constraint = answer_constraint(REPETITIVE_SCHEMA)
    submissions = [submission(compiler, constraint, request), Submission(free)]
    constrained_handle, free_handle = cluster_of(2).engine.submit_all(submissions)
    check(reply_of(constrained_handle).reply, constraint, REPETITIVE_SCHEMA)
    assert rest_of(free_handle)[0] == tokens_alone


def test_the_reasoning_of_a_required_call_is_closed_by_its_budget(
    cluster_of: ClusterOf, compiler: GrammarCompiler
) -> None:
    instant = instant_request(compiler.tokenizer, seed=3, max_tokens=400, ending_bias=20.0)
    thinking = replace(instant, prompt_ids=instant.prompt_ids[:-1])  # without </think>
    constraint = call_constraint(REPETITIVE_SCHEMA, is_parallel=False)
    submissions = [submission(compiler, constraint, thinking, ReplyLimits(thinking_budget=9))]
    generated = reply_of(*cluster_of(2).engine.submit_all(submissions))
    assert generated.finish_reason is FinishReason.STOP
    assert generated.reply.reasoning
    assert generated.token_ids.index(compiler.tokenizer.token_id("</think>")) == 9
    check(generated.reply, constraint, REPETITIVE_SCHEMA)
