"""Tests of the schemas in tests/coordinator/goldens: as the form of an answer, and as parameters of a required tool."""

import json
from collections.abc import Iterator
from typing import Any

import hypothesis
import jsonschema
import pytest

from mlx_k2.scheduling.request import FinishReason
from mlx_k2.text.constraint import Constraint
from mlx_k2.text.reply_grammar import compile_constraint
from mlx_k2.text.reply_parts import Reply
from tests.coordinator.constrained import COMPILER, generate_reply, policy_of, random_choice
from tests.coordinator.schemas import SCHEMAS, TOOL, answer_constraint, as_parameters, call_constraint

ENDING_PROBABILITY = 0.999
"""Probability of a token that ends a JSON value where one is allowed: as high as with a logit bias of +20."""
NUM_SEEDS = 50 if hypothesis.settings.get_current_profile_name() == "long" else 1
"""Number of replies for each schema and constraint."""


def constraints_of(schema: Any) -> Iterator[tuple[Constraint, Any]]:
    """Yield the constraints of an answer and of a call, each with the schema of its JSON."""
    yield answer_constraint(schema), schema
    yield call_constraint(as_parameters(schema)), as_parameters(schema)


def check(reply: Reply, constraint: Constraint, schema: Any) -> None:
    """Check that a complete reply is an answer, or at least one call, in JSON of the schema."""
    if constraint.answer is not None:
        jsonschema.validate(json.loads(reply.content), schema)
        return
    assert reply.calls and reply.content == ""
    for call in reply.calls:
        assert (call.name, call.error) == (TOOL, None)
        jsonschema.validate(json.loads(call.arguments), schema)


def test_every_schema_is_enforced_without_a_warning() -> None:
    for name, schema in SCHEMAS.items():
        for constraint, _ in constraints_of(schema):
            assert compile_constraint(COMPILER, constraint).warnings == (), name


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_replies_that_tend_to_end_are_complete_and_valid(schema: Any) -> None:
    for constraint, json_schema in constraints_of(schema):
        for seed in range(NUM_SEEDS):
            generated = generate_reply(
                policy_of(constraint), random_choice(seed, ending=ENDING_PROBABILITY), max_tokens=4096
            )
            assert generated.finish_reason is FinishReason.STOP
            check(generated.reply, constraint, json_schema)


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_replies_of_random_tokens_are_valid_or_end_with_length_inside_their_last_call(schema: Any) -> None:
    for constraint, json_schema in constraints_of(schema):
        for seed in range(NUM_SEEDS):
            generated = generate_reply(policy_of(constraint), random_choice(seed), max_tokens=300)
            if generated.finish_reason is FinishReason.STOP:
                check(generated.reply, constraint, json_schema)
            else:
                assert generated.finish_reason is FinishReason.LENGTH
                assert all(call.error is None for call in generated.reply.calls[:-1])
