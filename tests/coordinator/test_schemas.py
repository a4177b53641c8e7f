"""Tests of the schemas of another project's suites: as the form of an answer, and as parameters of a required tool."""

import json
from collections.abc import Callable
from typing import Any

import hypothesis
import jsonschema
import pytest

from mlx_k2.scheduling.request import FinishReason
from mlx_k2.text.constraint import Constraint
from mlx_k2.text.reply_grammar import compile_constraint
from mlx_k2.text.reply_parts import Reply
from tests.coordinator.constrained import COMPILER, policy_of, random_choice, write_reply
from tests.coordinator.schemas import SCHEMAS, TOOL, answer_of, as_parameters, call_of

ENDING = 0.999
"""Fraction of steps at which a token that ends values is chosen if one is allowed, as with a logit bias of +20."""
NUM_SEEDS = 50 if hypothesis.settings.get_current_profile_name() == "long" else 1
FORMS: list[tuple[Callable[[Any], Constraint], Callable[[Any], Any]]] = [  # a constraint of a schema; that schema
    (answer_of, lambda schema: schema),
    (call_of, as_parameters),
]


def check(reply: Reply, constraint: Constraint, schema: Any) -> None:
    """Check that a complete reply is what the constraint demands."""
    if constraint.answer is not None:
        jsonschema.validate(json.loads(reply.content), schema)
        return
    assert reply.calls and reply.content == ""
    for call in reply.calls:
        assert (call.name, call.error) == (TOOL, None)
        jsonschema.validate(json.loads(call.arguments), schema)


def test_no_schema_needs_a_fallback() -> None:
    forms = [(name, form(changed(schema))) for name, schema in SCHEMAS.items() for form, changed in FORMS]
    assert {name for name, constraint in forms if compile_constraint(COMPILER, constraint).warnings} == set()


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_replies_that_tend_to_end_are_complete_and_valid(schema: Any) -> None:
    for form, changed in FORMS:
        constraint = form(changed(schema))
        for seed in range(NUM_SEEDS):
            written = write_reply(policy_of(constraint), random_choice(seed, ending=ENDING), 4096)
            assert written.finish_reason is FinishReason.STOP
            check(written.reply, constraint, changed(schema))


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_replies_to_random_logits_are_valid_or_end_with_length_and_no_call(schema: Any) -> None:
    for form, changed in FORMS:
        constraint = form(changed(schema))
        for seed in range(NUM_SEEDS):
            written = write_reply(policy_of(constraint), random_choice(seed), 300)
            if written.finish_reason is FinishReason.STOP:
                check(written.reply, constraint, changed(schema))
            else:
                assert written.finish_reason is FinishReason.LENGTH
                assert all(call.error is None or call is written.reply.calls[-1] for call in written.reply.calls)
