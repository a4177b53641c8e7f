"""Tests of constraints that cannot be used: an error names the problem, a warning what is not enforced."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from mlx_k2.errors import RequestError, RequestFailed
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import Request, check_request
from mlx_k2.text.constraint import AnswerForm, AnswerFormat, Constraint, Tool, ToolChoice, ToolRules, tool_rules
from mlx_k2.text.grammar import MAX_GRAMMAR_BYTES, GrammarCompiler
from mlx_k2.text.reply_grammar import compile_constraint
from mlx_k2.text.tokenizer import Tokenizer
from tests.coordinator.constrained import COMPILER, generate_reply, policy_of, random_choice
from tests.coordinator.schemas import answer_constraint, call_constraint

CLOCK_DECLARATIONS = [{"type": "function", "function": {"name": "clock"}}]
REFERENCE_LOOP = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
ENDLESS_OBJECT = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
ENDLESS_LIST = {"type": "array", "items": {"$ref": "#"}, "minItems": 1}
ENDLESS_ALTERNATIVES = {
    "anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
    "$defs": {
        name: {"type": "object", "properties": {"x": {"$ref": f"#/$defs/{other}"}}, "required": ["x"]}
        for name, other in ("ab", "ba")
    },
}
REFERENCE_CHAIN = {
    "$defs": {str(number): {"$ref": f"#/$defs/{number + 1}"} for number in range(5000)},
    "$ref": "#/$defs/0",
}

BAD_SCHEMAS = {
    "a list": ([1], "is not a JSON schema"),
    "a text": ("foo", "is not a JSON schema"),
    "true": (True, "is not a JSON schema"),
    "an unknown type": ({"type": "strnig"}, "Invalid type: strnig"),
    "properties that are a number": ({"properties": 5}, "properties must be an object"),
    "a remote reference": ({"$ref": "http://example.org/schema.json"}, "does not fetch resources"),
    "a reference to nothing": ({"$ref": "#/$defs/q"}, "does not exist"),
    "a reference to itself": ({"$ref": "#"}, "refers to itself without end"),
    "references in a loop": (REFERENCE_LOOP, "refers to itself without end"),
    "an object that needs itself": (ENDLESS_OBJECT, "refers to itself without end"),
    "a list that needs itself": (ENDLESS_LIST, "refers to itself without end"),
    "alternatives that all need themselves": (ENDLESS_ALTERNATIVES, "refers to itself without end"),
    "a long chain of references": (REFERENCE_CHAIN, "too complex"),
    "a range without a value": ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum (5) is greater than maximum"),
    "a malformed pattern": ({"type": "string", "pattern": "("}, "unclosed group"),
    "5 MB": ({"enum": ["x" * 5_000_000]}, f"is larger than {MAX_GRAMMAR_BYTES} bytes"),
    "too many combinations": (
        {
            "allOf": [
                {"anyOf": [{"type": "object", "properties": {f"p{number}": {"const": value}}} for value in range(4)]}
                for number in range(12)
            ]
        },
        "schema too large",
    ),
    "values that are not JSON": ({"enum": [object()]}, "is not JSON"),
    "too much depth": (json.loads('{"items":' * 150 + "{}" + "}" * 150), "nested more than 100 deep"),
}


@pytest.mark.parametrize(("schema", "problem"), BAD_SCHEMAS.values(), ids=BAD_SCHEMAS)
def test_a_schema_that_cannot_be_used_is_refused(schema: Any, problem: str) -> None:
    started_at = time.monotonic()
    with pytest.raises(RequestError, match=re.escape(problem)):
        compile_constraint(COMPILER, answer_constraint(schema))
    assert time.monotonic() - started_at < 10


def test_the_error_about_the_schema_of_a_tool_names_the_tool() -> None:
    with pytest.raises(RequestError, match="the schema of tool 'record' has no finite value"):
        compile_constraint(COMPILER, call_constraint(ENDLESS_OBJECT))


RECURSIVE = {
    "an optional property": {"type": "object", "properties": {"a": {"$ref": "#"}}},
    "an alternative": {"anyOf": [{"type": "null"}, ENDLESS_OBJECT | {"properties": {"a": {"$ref": "#"}}}]},
    "a list that may be empty": {"type": "array", "items": {"$ref": "#"}},
}


@pytest.mark.parametrize("schema", RECURSIVE.values(), ids=RECURSIVE)
def test_a_recursive_schema_with_a_finite_value_is_used(schema: Any) -> None:
    generated = generate_reply(policy_of(answer_constraint(schema)), random_choice(1, ending=0.9), max_tokens=500)
    json.loads(generated.reply.content)


NOT_ENFORCED = {
    "a keyword": ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
    "a format": ({"type": "object", "properties": {"a": {"type": "string", "format": "colour"}}}, "colour"),
    "a pattern that looks ahead": (
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!x)"}}},
        "look-ahead",
    ),
    "one of several objects": (
        {"type": "object", "properties": {"a": {"oneOf": [{"type": "object"}, {"type": "object"}]}}},
        "oneOf",
    ),
}


@pytest.mark.parametrize(("schema", "word"), NOT_ENFORCED.values(), ids=NOT_ENFORCED)
def test_a_part_of_a_schema_that_is_not_enforced_is_a_warning_and_with_strict_an_error(schema: Any, word: str) -> None:
    strict_answer = Constraint(AnswerFormat(AnswerForm.JSON_SCHEMA, schema=schema, is_strict=True))
    strict_call = Constraint(tools=ToolRules((Tool("a", schema, is_strict=True),), ToolChoice.REQUIRED))
    for constraint, strict in ((answer_constraint(schema), strict_answer), (call_constraint(schema), strict_call)):
        (warning,) = compile_constraint(COMPILER, constraint).warnings
        assert word in warning
        with pytest.raises(RequestError, match=word):
            compile_constraint(COMPILER, strict)


VALID_BUT_REFUSED: dict[str, Any] = {
    "patterns of keys that overlap": {"patternProperties": {"^a": {"type": "string"}, "^ab": {"type": "integer"}}},
    "a number of keys": {"maxProperties": 3, "properties": {"a": {"type": "string"}}},
    "an end of text": {"properties": {"a": {"type": "string", "pattern": r"a\Z"}}},
    "a control letter": {"properties": {"a": {"type": "string", "pattern": r"\cA"}}},
    "a brace": {"properties": {"a": {"type": "string", "pattern": "{a}"}}},
    "a bracket in a class": {"properties": {"a": {"type": "string", "pattern": "[a[b]"}}},
}


@pytest.mark.parametrize("schema", VALID_BUT_REFUSED.values(), ids=VALID_BUT_REFUSED)
def test_a_valid_schema_that_the_compiler_refuses_is_a_warning(schema: Any) -> None:
    for constraint in (answer_constraint(schema), call_constraint(schema), optional_call(schema)):
        assert len(compile_constraint(COMPILER, constraint).warnings) == 1


def optional_call(parameters: Any) -> Constraint:
    """Return the constraint of a reply that may call a tool with these parameters."""
    return Constraint(tools=ToolRules((Tool("a", parameters),)))


def test_an_invalid_schema_of_an_optional_tool_is_a_warning_and_one_without_a_finite_value_an_error() -> None:
    invalid = {"type": "object", "properties": {"a": {"type": "strnig"}}}
    (warning,) = compile_constraint(COMPILER, optional_call(invalid)).warnings
    assert "any object is allowed: Invalid type: strnig" in warning
    with pytest.raises(RequestError, match="refers to itself without end"):
        compile_constraint(COMPILER, optional_call(ENDLESS_OBJECT))


def test_the_identifier_of_the_latest_json_schema_draft_is_known() -> None:
    schema = {"$schema": "http://json-schema.org/schema#", "type": "object"}
    assert compile_constraint(COMPILER, answer_constraint(schema)).warnings == ()


def test_more_than_512_tools_are_refused() -> None:
    with pytest.raises(RequestError, match="513 tools are declared: declare at most 512"):
        tool_rules([{"type": "function", "function": {"name": f"f{number}"}} for number in range(513)])


def test_a_schema_with_unsupported_keywords_is_enforced_without_them() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "minContains": 1,
        "not": {},
    }
    generated = generate_reply(policy_of(answer_constraint(schema)), random_choice(0, ending=0.9), max_tokens=500)
    assert isinstance(json.loads(generated.reply.content)["a"], bool)


def test_options_of_the_compiler_in_a_schema_are_ignored() -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "x-guidance": {"whitespace_pattern": " *"}}
    for seed in range(20):
        generated = generate_reply(policy_of(answer_constraint(schema)), random_choice(seed), max_tokens=500)
        assert " " not in generated.reply.content


BAD_GRAMMARS = {
    "a malformed regular expression": (AnswerForm.REGEX, "(", "unclosed group"),
    "a large regular expression": (AnswerForm.REGEX, "x" * 300_000, "larger than"),
    "a malformed grammar": (AnswerForm.LARK, "start: (", "cannot be compiled"),
    "an unknown rule": (AnswerForm.LARK, "start: other", "cannot be compiled"),
    "no text": (AnswerForm.LARK, 'start: start "a"', "allows no text"),
    "a control token": (AnswerForm.LARK, "start: <think>", "unknown special token"),
    "a control token's number": (AnswerForm.LARK, "start: <[600]>", "allows no text"),
    "the token that ends a turn": (AnswerForm.LARK, "start: <|im_end|>", "cannot be compiled"),
}


@pytest.mark.parametrize(("form", "grammar", "problem"), BAD_GRAMMARS.values(), ids=BAD_GRAMMARS)
def test_a_grammar_that_cannot_be_used_is_refused(form: AnswerForm, grammar: str, problem: str) -> None:
    with pytest.raises(RequestError, match=re.escape(problem)):
        compile_constraint(COMPILER, Constraint(AnswerFormat(form, grammar)))


@pytest.mark.parametrize(
    "pattern", ["(a|aa)+$", "(.*a){40}", "(a?){200}a{200}", ".*a.{60}", "((a{1,1000}){1,1000}){1,1000}", "(a*)*b"]
)
def test_a_pattern_with_many_ways_to_match_is_masked_in_bounded_time_or_refused(pattern: str) -> None:
    slowest_s = 0.0
    started_at = time.monotonic()
    try:
        policy = policy_of(Constraint(AnswerFormat(AnswerForm.REGEX, pattern)))
        for token_id in b"a" * 100:
            policy.accept(token_id)
            accepted_at = time.monotonic()
            policy.forced()
            policy.token_mask(())
            slowest_s = max(slowest_s, time.monotonic() - accepted_at)
    except (RequestError, RequestFailed) as error:
        assert "cannot follow" in str(error) or "cannot be compiled" in str(error)
    assert slowest_s < 1 and time.monotonic() - started_at < 10


BAD_VALUES: dict[str, tuple[Callable[[], object], str]] = {
    "a tool that is not declared": (
        lambda: tool_rules(CLOCK_DECLARATIONS, {"type": "function", "function": {"name": "calendar"}}),
        "tool_choice names 'calendar', which is not declared; declared tools: clock",
    ),
    "an unknown choice": (lambda: tool_rules(CLOCK_DECLARATIONS, "always"), "tool_choice 'always' is unknown"),
    "a call without tools": (lambda: tool_rules([], "required"), "tool_choice is required, and no tool is declared"),
    "a tool without a name": (lambda: tool_rules([{"type": "function"}]), "a tool has no function with a name"),
    "parameters that are no object": (
        lambda: compile_constraint(COMPILER, call_constraint({"type": "string"})),
        "the schema of tool 'record' has the type 'string': arguments are an object",
    ),
    "a bias outside the vocabulary": (
        lambda: check_request(
            Request((1,), 1, Sampling(seed=0, logit_bias=((640, 1.0),)), frozenset()),
            vocab_size=640,
            context_tokens=100,
        ),
        "a logit bias is for token id 640, outside the vocabulary of 640",
    ),
    "a bias that is too large": (lambda: Sampling(seed=0, logit_bias=((1, 101.0),)), "give a value from -100 to 100"),
    "a bias that is no number": (lambda: Sampling(seed=0, logit_bias=((1, float("nan")),)), "from -100 to 100"),
    "two biases of a token": (lambda: Sampling(seed=0, logit_bias=((1, 1.0), (1, 2.0))), "has two logit biases"),
    "too many biases": (
        lambda: Sampling(seed=0, logit_bias=tuple((number, 1.0) for number in range(1025))),
        "the number of logit biases 1025 is out of range",
    ),
    "a large penalty": (lambda: Sampling(seed=0, presence_penalty=2.1), "give a value from -2 to 2"),
    "a penalty that is no number": (lambda: Sampling(seed=0, frequency_penalty=float("nan")), "from -2 to 2"),
}


@pytest.mark.parametrize(("build", "problem"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_an_invalid_tool_choice_tool_bias_or_penalty_is_refused(build: Callable[[], object], problem: str) -> None:
    with pytest.raises(RequestError, match=re.escape(problem)):
        build()


def test_calls_need_a_vocabulary_with_their_markers() -> None:
    byte_tokens = {value: bytes([value]) for value in range(256)}
    tokenizer = Tokenizer(lambda text: list(text.encode()), byte_tokens, {"<|im_end|>": 256}, 257)
    compiler = GrammarCompiler(tokenizer)
    with pytest.raises(RequestError, match=r"the model's vocabulary has no <\|tool_calls_section_begin\|>"):
        compile_constraint(compiler, call_constraint({"type": "object"}))
    assert compile_constraint(compiler, answer_constraint({"type": "object"})).warnings == ()
