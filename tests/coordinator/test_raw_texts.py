"""Tests of raw texts with a grammar: text that continues a prompt and matches a regular expression from the start."""

import re

import pytest

from mlx_k2.coordinator.reply_policy import NO_LIMITS, ReplyLimits, ReplyPolicy
from mlx_k2.errors import RequestError
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.text.constraint import AnswerForm, AnswerFormat, Constraint
from mlx_k2.text.reply_grammar import compile_constraint
from tests.advice import follows_advice
from tests.coordinator.constrained import (
    COMPILER,
    STOP_ID,
    THINK_END_ID,
    THINK_ID,
    TOKENIZER,
    allowed_ids,
    generate_reply,
    random_choice,
)


def raw_policy(pattern: str, limits: ReplyLimits = NO_LIMITS, *stop_ids: int) -> ReplyPolicy:
    """Return the policy of a raw text that matches ``pattern`` and ends at one of ``stop_ids``, if any."""
    grammar = compile_constraint(COMPILER, Constraint(AnswerFormat(AnswerForm.REGEX, pattern)))
    request = Request((5,), 50, Sampling(seed=0), frozenset(stop_ids))
    return ReplyPolicy(TOKENIZER, request, limits, grammar, is_raw=True)


def test_a_raw_text_matches_its_pattern_from_its_first_token_and_has_no_reasoning() -> None:
    for seed in range(20):
        policy = raw_policy("[ab]{3,9}", NO_LIMITS, STOP_ID)
        assert not {THINK_ID, THINK_END_ID} & set(allowed_ids(policy.token_mask(())))
        generated = generate_reply(policy, random_choice(seed), max_tokens=50)
        assert re.fullmatch("[ab]{3,9}", generated.reply.content)
        assert generated.finish_reason is FinishReason.STOP


def test_no_stop_token_of_a_raw_text_is_allowed_before_min_tokens() -> None:
    policy = raw_policy("a*", ReplyLimits(min_tokens=2), STOP_ID)
    for _ in range(2):
        assert STOP_ID not in allowed_ids(policy.token_mask(()))
        policy.accept(TOKENIZER.encode_text("a")[0])
    assert STOP_ID in allowed_ids(policy.token_mask(()))


@follows_advice(
    "the form of the answer allows only the empty text: leave out ignore_eos",
)
def test_a_pattern_that_matches_only_the_empty_text_is_refused_without_a_stop_token() -> None:
    with pytest.raises(RequestError, match="allows only the empty text"):
        raw_policy("")
    assert raw_policy("", NO_LIMITS, STOP_ID).forced() == (STOP_ID,)


def test_a_stop_token_with_text_is_forced_after_a_complete_answer() -> None:
    (point,) = TOKENIZER.encode_text(".")
    policy = raw_policy("a", NO_LIMITS, point)
    policy.accept(TOKENIZER.encode_text("a")[0])
    assert list(policy.forced()) == [point]
    assert policy.accept(point).finish_reason is None  # the sequence ends at its stop token
