"""Tests of constrained replies over real stages: the same with drafts and over any number of stages."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import jsonschema
import msgspec
import pytest

from mlx_k2.coordinator.handle import Finished, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.coordinator.reply_policy import ReplyLimits, ReplyPolicy
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.text.constraint import AnswerForm, AnswerFormat, Constraint
from mlx_k2.text.grammar import GrammarCompiler
from mlx_k2.text.reply_grammar import compile_constraint
from mlx_k2.text.reply_parts import Part, whole_reply
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer
from tests.coordinator.constrained import WrittenReply
from tests.coordinator.schemas import answer_of, call_of
from tests.coordinator.test_schemas import check
from tests.local_cluster import VOCAB_SIZE, Cluster, local_cluster, local_host, write_model

CONTEXT_TOKENS = 1024
LISTS = {
    "type": "object",
    "properties": {
        "names": {"type": "array", "items": {"enum": ["anna", "anton"]}, "minItems": 12, "maxItems": 12},
        "more": {"type": "string", "maxLength": 20},
    },
    "required": ["names", "more"],
    "additionalProperties": False,
}
"""A schema whose answers repeat themselves, so that some drafts are right."""
ClusterOf = Callable[[int], Cluster]


@pytest.fixture(scope="module")
def cluster_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterOf]:
    """Yield a function from a number of stages to a cluster. One stage runs without drafts, several with."""
    folder = write_model(tmp_path_factory.mktemp("model") / "tiny", CONTEXT_TOKENS)
    with ExitStack() as stack:

        def start(num_stages: int) -> Cluster:
            hosts = [local_host()] * num_stages
            started = local_cluster(folder, hosts, drafts=num_stages > 1, context_tokens=CONTEXT_TOKENS)
            return stack.enter_context(started)

        yield cache(start)


@pytest.fixture(scope="module")
def compiler(cluster_of: ClusterOf) -> GrammarCompiler:
    return GrammarCompiler(load_tokenizer(cluster_of(1).deployment.model.files, VOCAB_SIZE))


def request_without_thinking(tokenizer: Tokenizer, seed: int, max_tokens: int, *, bias: float = 0.0) -> Request:
    """Return a request whose prompt ends with an empty reasoning. ``bias`` is that of tokens which end values."""
    stop_id = tokenizer.token_id("<|im_end|>")
    ending = [number for number in range(VOCAB_SIZE) if tokenizer.token_bytes(number)[:1] in (b'"', b"}", b"]", b",")]
    biases = tuple((number, bias) for number in ending) if bias else ()
    prompt_ids = (stop_id, seed % 200, tokenizer.token_id("<think>"), tokenizer.token_id("</think>"))
    return Request(prompt_ids, max_tokens, Sampling(seed=seed, logit_bias=biases), frozenset({stop_id}))


def run(
    cluster: Cluster, compiler: GrammarCompiler, constraint: Constraint, *requests: Request, **limits: Any
) -> list[WrittenReply]:
    """Run constrained requests together; return the tokens, the reply and the finish reason of each."""
    grammar = compile_constraint(compiler, constraint)
    handles = cluster.engine.submit_all(
        [
            Submission(request, ReplyPolicy(compiler.tokenizer, request, ReplyLimits(**limits), grammar))
            for request in requests
        ]
    )
    results: list[WrittenReply] = []
    for handle in handles:
        token_ids: list[int] = []
        parts: list[Part] = []
        for event in handle.events():
            if isinstance(event, Token):
                token_ids.append(event.token_id)
            if isinstance(event, Token | Finished):
                parts += event.parts
        assert isinstance(event, Finished)
        results.append(WrittenReply(token_ids, whole_reply(parts), event.reason))
    return results


@pytest.mark.slow
def test_tokens_are_the_same_with_drafts_and_over_1_2_and_3_stages(
    cluster_of: ClusterOf, compiler: GrammarCompiler
) -> None:
    regex = Constraint(AnswerFormat(AnswerForm.REGEX, "(ab|cd|ef|gh){30,60}"))
    for constraint in (answer_of(LISTS), call_of(LISTS, is_parallel=False), regex):
        plain = request_without_thinking(compiler.tokenizer, 5, 600, bias=20.0)
        penalized = msgspec.structs.replace(plain.sampling, presence_penalty=0.5, frequency_penalty=0.1)
        for request in (plain, replace(plain, sampling=penalized)):
            one, two, three = (run(cluster_of(stages), compiler, constraint, request) for stages in (1, 2, 3))
            assert one == two == three
            assert one[0].finish_reason is FinishReason.STOP


def test_drafts_are_accepted_in_a_constrained_answer(cluster_of: ClusterOf, compiler: GrammarCompiler) -> None:
    request = request_without_thinking(compiler.tokenizer, 5, 400, bias=5.0)
    grammar = compile_constraint(compiler, answer_of(LISTS))
    *_, end = cluster_of(2).engine.submit(request, ReplyPolicy(compiler.tokenizer, request, grammar=grammar)).events()
    assert isinstance(end, Finished)
    assert end.summary.drafted >= end.summary.accepted > 0


def test_constrained_and_free_replies_run_side_by_side(cluster_of: ClusterOf, compiler: GrammarCompiler) -> None:
    free = Request((1, 2, 3), 40, Sampling(seed=1), frozenset())
    alone = cluster_of(2).tokens(free)[free]
    request = request_without_thinking(compiler.tokenizer, 3, 200, bias=20.0)
    grammar = compile_constraint(compiler, answer_of(LISTS))
    policy = ReplyPolicy(compiler.tokenizer, request, grammar=grammar)
    constrained, other = cluster_of(2).engine.submit_all([Submission(request, policy), Submission(free)])
    text = "".join(part.text for part in parts_of(constrained.events()))
    jsonschema.validate(json.loads(text), LISTS)
    assert [event.token_id for event in other.events() if isinstance(event, Token)] == alone


def parts_of(events: Iterator[Any]) -> list[Any]:
    """Return the parts of a reply."""
    return [part for event in events if isinstance(event, Token | Finished) for part in event.parts]


def test_the_reasoning_of_a_required_call_is_closed_by_its_budget(
    cluster_of: ClusterOf, compiler: GrammarCompiler
) -> None:
    request = request_without_thinking(compiler.tokenizer, 3, 400, bias=20.0)
    with_thinking = replace(request, prompt_ids=request.prompt_ids[:-1])
    constraint = call_of(LISTS, is_parallel=False)
    (result,) = run(cluster_of(2), compiler, constraint, with_thinking, thinking_budget=9)
    assert result.finish_reason is FinishReason.STOP
    assert result.reply.reasoning
    assert result.token_ids.index(compiler.tokenizer.token_id("</think>")) == 9
    check(result.reply, constraint, LISTS)
