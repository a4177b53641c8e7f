"""Tests of constrained replies: whatever the logits, the answer follows its grammar or ends with ``length``."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_k2.coordinator.reply_policy import NO_LIMITS, ReplyLimits, ReplyPolicy
from mlx_k2.errors import RequestError, RequestFailed
from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.drafter import NgramDrafter
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.scheduling.sequence import Sequence, SharedPrefix
from mlx_k2.text.constraint import AnswerForm, AnswerFormat, Constraint, Tool, ToolChoice, ToolRules, tool_rules
from mlx_k2.text.grammar import GrammarCompiler
from mlx_k2.text.reply_grammar import MAX_CALLS, compile_constraint
from tests.advice import follows_advice
from tests.coordinator.constrained import (
    COMPILER,
    NO_THINKING,
    STOP_ID,
    THINK,
    THINK_END,
    TOKENIZER,
    WrittenReply,
    allowed_ids,
    policy_of,
    random_choice,
    write_reply,
)

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER_TOOL = Tool("get_weather", WEATHER)
CLOCK_TOOL = Tool("mcp__clock-1.x", None)
SECTION_BEGIN, SECTION_END, CALL_BEGIN, ARGUMENTS_BEGIN, CALL_END = (
    TOKENIZER.token_id(f"<|{name}|>")
    for name in (
        "tool_calls_section_begin",
        "tool_calls_section_end",
        "tool_call_begin",
        "tool_call_argument_begin",
        "tool_call_end",
    )
)
THINKS = (STOP_ID, THINK)
"""A prompt after which the reply is inside the reasoning."""

leaves = st.one_of(
    st.fixed_dictionaries({"type": st.just("string")}, optional={"maxLength": st.integers(0, 5)}),
    st.fixed_dictionaries({"type": st.just("integer")}, optional={"minimum": st.integers(-9, 0)}),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": ["a", 'b"', 3]}, {"const": {"k": [1, None]}}]),
    st.sampled_from(["^[a-f]{2,4}$", r"^\d{3}-\w$", "^(foo|bär)$"]).map(lambda one: {"type": "string", "pattern": one}),
    st.sampled_from(["date", "time", "uuid", "ipv4", "email"]).map(lambda one: {"type": "string", "format": one}),
    st.lists(st.sampled_from(["a", "ü", 1, 2.5, None, True, {"$ref": "ü"}, [], -0.5]), min_size=1).map(
        lambda values: {"enum": values, "description": "d" * 5000}
    ),
    st.sampled_from([{"type": ["string", "null"], "maxLength": 3}, {"$ref": "#/$defs/tree ü"}, {"multipleOf": 5}]),
)
DEFINITIONS = {
    "tree ü": {
        "type": ["object", "null"],
        "properties": {"枝": {"type": "array", "items": {"$ref": "#/$defs/tree ü"}, "maxItems": 2}},
        "additionalProperties": False,
    }
}


def _containers(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "b c", "ü", 'q"', "x/y"])
    objects = st.builds(
        lambda properties, required, extra: {
            "type": "object",
            "properties": properties,
            "required": sorted(properties)[:required],
            "additionalProperties": extra,
        },
        st.dictionaries(names, inner, max_size=3),
        st.integers(0, 3),
        st.booleans(),
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array"), "items": inner},
        optional={
            "minItems": st.integers(0, 2),
            "maxItems": st.integers(2, 3),
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
        },
    )
    either = st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)})
    tagged = st.builds(
        lambda one, other: {"oneOf": [_tagged(name, part) for name, part in (("x", one), ("y", other))]}, inner, inner
    )
    both = st.builds(lambda one, other: {"allOf": [_tagged("x", one), {"properties": {"z": other}}]}, inner, inner)
    return st.one_of(objects, arrays, either, tagged, both)


def _tagged(name: str, part: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": name}, name: part}, "required": ["kind", name]}


schemas = st.recursive(leaves, _containers, max_leaves=6).map(lambda schema: schema | {"$defs": DEFINITIONS})
endings = st.sampled_from([0.0, 0.5, 0.95])
few = settings() if settings.get_current_profile_name() != "fixed" else settings(max_examples=30)
"""The settings of properties that write long replies: fewer examples in the profile of the fast tests."""


def answer(schema: object) -> Constraint:
    """Return the constraint of an answer in JSON."""
    return Constraint(answer=AnswerFormat(AnswerForm.JSON_SCHEMA, schema=schema))


def calls(*tools: Tool, choice: ToolChoice = ToolChoice.REQUIRED, **rules: Any) -> Constraint:
    """Return the constraint of a reply that calls tools."""
    return Constraint(tools=ToolRules(tools, choice, **rules))


def text_of(written: WrittenReply) -> str:
    """Return the text of a reply, with its control tokens."""
    return b"".join(TOKENIZER.token_bytes(number) for number in written.token_ids).decode(errors="replace")


@few
@given(schemas, st.integers(0, 2**32), endings)
def test_whatever_the_logits_an_answer_is_valid_or_ends_with_length(schema: Any, seed: int, ending: float) -> None:
    written = write_reply(policy_of(answer(schema)), random_choice(seed, ending=ending), 300)
    if written.finish_reason is FinishReason.STOP:
        jsonschema.validate(json.loads(written.reply.content), schema)
        assert written.token_ids[-1] == STOP_ID
        assert not re.search(r"[,:{\[]\s|\s[}\]]", re.sub(r'"(\\.|[^"\\])*"', '""', written.reply.content))
    else:
        assert len(written.token_ids) == 300


@given(
    st.sampled_from([r"[a-c]{2,5}-[0-9]+", r"(yes|no|maybe)( please)?", r"([a-z]+ ){0,3}end", "ä+ö?", r'"[^"]*"']),
    st.integers(0, 2**32),
)
def test_whatever_the_logits_an_answer_matches_its_regular_expression(pattern: str, seed: int) -> None:
    constraint = Constraint(answer=AnswerFormat(AnswerForm.REGEX, pattern))
    written = write_reply(policy_of(constraint), random_choice(seed), 60)
    if written.finish_reason is FinishReason.STOP:
        assert re.fullmatch(pattern, written.reply.content, re.DOTALL)


@given(st.integers(0, 2**32))
def test_whatever_the_logits_an_answer_follows_its_lark_grammar(seed: int) -> None:
    sums = 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,3}/'
    constraint = Constraint(answer=AnswerFormat(AnswerForm.LARK, sums))
    written = write_reply(policy_of(constraint), random_choice(seed), 80)
    if written.finish_reason is FinishReason.STOP:
        assert re.fullmatch(r"[0-9+()]+", written.reply.content)
        eval(re.sub(r"\b0+(?=\d)", "", written.reply.content), {"__builtins__": {}})


@few
@given(st.lists(schemas, min_size=1, max_size=3), st.integers(0, 2**32), endings, st.booleans())
def test_whatever_the_logits_required_calls_are_valid_or_the_reply_ends_with_length(
    parts: list[Any], seed: int, ending: float, is_parallel: bool
) -> None:
    by_name = {
        f"tool-{index}.a": {
            "type": "object",
            "properties": {"v": part},
            "required": ["v"],
            "$defs": DEFINITIONS,
        }
        for index, part in enumerate(parts)
    }
    tools = [Tool(name, schema) for name, schema in by_name.items()]
    written = write_reply(policy_of(calls(*tools, is_parallel=is_parallel)), random_choice(seed, ending=ending), 400)
    complete_calls = [call for call in written.reply.calls if call.error is None]
    for call in complete_calls:
        jsonschema.validate(json.loads(call.arguments), by_name[call.name])
    if written.finish_reason is FinishReason.STOP:
        assert len(complete_calls) == len(written.reply.calls) >= 1
        assert is_parallel or len(complete_calls) == 1
        assert [call.written_id for call in complete_calls] == [
            f"functions.{call.name}:{number}" for number, call in enumerate(complete_calls)
        ]
        assert written.reply.content == ""


@few
@given(st.one_of(schemas.map(answer), st.just(calls(WEATHER_TOOL, CLOCK_TOOL))), st.integers(0, 2**32), st.data())
def test_a_mask_after_drafts_is_the_mask_after_the_same_accepted_tokens(
    constraint: Constraint, seed: int, data: st.DataObject
) -> None:
    masks: list[tuple[list[int], list[int]]] = []
    write_reply(
        policy_of(constraint),
        random_choice(seed, ending=0.7),
        80,
        on_mask=lambda ids, mask: masks.append((ids.copy(), allowed_ids(mask))),
    )
    assume(masks)
    first, _ = data.draw(st.sampled_from(masks))
    policy = policy_of(constraint)
    for token_id in first:
        policy.accept(token_id)
    drafts: list[int] = []
    for ids, allowed in masks:
        if ids[: len(first)] != first:
            continue
        following = ids[len(first) :]
        while len(drafts) < len(following) and policy.may_draft(drafts, following[len(drafts)]):
            drafts.append(following[len(drafts)])
        if drafts != following:
            assert TOKENIZER.is_special(following[len(drafts)])
            break
        assert allowed_ids(policy.token_mask(drafts)) == allowed


def test_no_draft_token_is_a_control_token_or_one_that_the_grammar_excludes() -> None:
    policy = policy_of(answer(WEATHER), THINKS)
    assert policy.may_draft((), ord("x"))
    assert not policy.may_draft((), THINK_END)
    policy.accept(THINK_END)
    assert [token for token in map(ord, 'x{"]') if policy.may_draft((), token)] == [ord("{")]
    assert policy.may_draft([ord("{")], ord('"'))
    assert not policy.may_draft([ord("{")], ord("}"))


def test_a_draft_token_that_exceeds_the_limits_of_the_grammar_is_dropped_and_the_answer_goes_on() -> None:
    policy = policy_of(Constraint(AnswerFormat(AnswerForm.REGEX, "bbb(bab|(c?){200}c{200})")))
    request = Request((*b"bbbcccccc", *NO_THINKING), 99, Sampling(seed=0), frozenset({STOP_ID}))
    sequence = Sequence(request, 4096, policy)
    sequence.start(0, SharedPrefix(), NgramDrafter())
    assert [appended.token.token_id for appended in sequence.append_forced()] == [*b"bbb"]
    sequence.num_planned = len(sequence.token_ids)
    drafts = []
    while (token_id := sequence.draft()) is not None:
        drafts.append(token_id)
        sequence.num_planned += 1
        mask = sequence.token_mask(sequence.num_planned)
        assert mask is not None and mask.allows(ord("c"))
    assert 0 < len(drafts) < 6, "the text before has c six times"
    assert sequence.error is None
    assert sequence.append_sampled(0, SampledToken(ord("b")), 1)
    assert sequence.finish_reason is FinishReason.STOP
    assert list(sequence.token_ids[sequence.num_prompt : -1]) == [*b"bbbbab"]


def test_a_reply_that_exceeds_the_limits_of_its_grammar_ends_no_other_reply_with_this_grammar() -> None:
    constraint = Constraint(AnswerFormat(AnswerForm.REGEX, "[ab]{3}(bab|(c?){200}c{200})"))
    failing, other = policy_of(constraint), policy_of(constraint)
    for policy in (failing, other):
        for token_id in b"abb":
            policy.accept(token_id)
    with pytest.raises(RequestFailed, match="its grammar cannot follow the answer"):
        for _ in range(50):
            failing.accept(ord("c"))
            failing.token_mask(())
    later = policy_of(constraint)
    for token_id in b"abb":
        later.accept(token_id)
    for policy in (other, later):
        policy.accept(ord("b"))
        assert policy.forced() == [*b"ab"]


def test_one_compiler_is_safe_from_several_threads() -> None:
    constraints = [answer(WEATHER), calls(WEATHER_TOOL, CLOCK_TOOL), answer({"type": "array"}), answer({"const": 5})]

    def reply_tokens(compiler: GrammarCompiler, number: int) -> list[int]:
        grammar = compile_constraint(compiler, constraints[number % len(constraints)])
        request = Request(NO_THINKING, 300, Sampling(seed=0), frozenset({STOP_ID}))
        return write_reply(ReplyPolicy(TOKENIZER, request, grammar=grammar), random_choice(number), 60).token_ids

    compiler, num_threads = GrammarCompiler(TOKENIZER), 8
    all_threads = threading.Barrier(num_threads)

    def write_all(first: int) -> list[list[int]]:
        all_threads.wait(60)  # all need the vocabulary's tables at once
        return [reply_tokens(compiler, first + step) for step in range(len(constraints))]

    with ThreadPoolExecutor(num_threads) as pool:
        replies_of_threads = list(pool.map(write_all, range(num_threads), timeout=60))
    for first, replies in enumerate(replies_of_threads):
        assert replies == [reply_tokens(COMPILER, first + step) for step in range(len(constraints))]


def test_tokens_without_an_alternative_are_forced() -> None:
    constraint = calls(CLOCK_TOOL, is_parallel=False)
    written = write_reply(
        policy_of(constraint), random_choice(0), 400, on_mask=lambda _ids, _mask: pytest.fail("a token was chosen")
    )
    assert text_of(written) == (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.mcp__clock-1.x:0<|tool_call_argument_begin|>{}"
        "<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
    )


def test_the_number_of_a_call_continues_those_of_the_prompt() -> None:
    prompt = (CALL_BEGIN, ARGUMENTS_BEGIN, CALL_END, CALL_BEGIN, ARGUMENTS_BEGIN, CALL_END, *NO_THINKING)
    third = write_reply(policy_of(calls(CLOCK_TOOL, is_parallel=False), prompt), random_choice(0), 400)
    assert [call.written_id for call in third.reply.calls] == ["functions.mcp__clock-1.x:2"]
    from_80 = calls(CLOCK_TOOL, is_parallel=False, first_number=80)
    numbered = write_reply(policy_of(from_80, prompt), random_choice(0), 400)
    assert [call.written_id for call in numbered.reply.calls] == ["functions.mcp__clock-1.x:80"]


def test_reasoning_comes_before_a_required_call_and_an_answer_in_json() -> None:
    for constraint in (calls(WEATHER_TOOL), answer(WEATHER)):
        policy = policy_of(constraint, THINKS)
        for token_id in (ord("h"), ord("m"), SECTION_END, ord("!")):  # a stray marker does not end the reasoning
            assert policy.forced() == ()
            mask = policy.token_mask(())
            assert mask is not None and not mask.allows(STOP_ID), "the reply cannot end inside the reasoning"
            policy.accept(token_id) if mask.allows(token_id) else None
        policy.accept(THINK_END)
        written = write_reply(policy, random_choice(1, ending=0.9), 400)
        assert written.finish_reason is FinishReason.STOP
        assert written.reply.calls or json.loads(written.reply.content)


def test_a_model_that_opens_its_reasoning_itself_may_do_so_before_a_constrained_answer() -> None:
    policy = policy_of(answer(WEATHER), (STOP_ID,))
    assert allowed_ids(policy.token_mask(())) == sorted([ord("{"), THINK])
    policy.accept(THINK)
    assert ord("x") in allowed_ids(policy.token_mask(()))
    policy.accept(THINK_END)
    assert policy.forced()[:1] == [ord("{")]


def test_a_section_that_begins_inside_the_reasoning_is_constrained() -> None:
    policy = policy_of(calls(WEATHER_TOOL), THINKS)
    policy.accept(SECTION_BEGIN)
    written = write_reply(policy, random_choice(1, ending=0.9), 400)
    assert written.reply.calls and not any(call.error for call in written.reply.calls)


def test_a_section_that_the_model_opens_itself_is_constrained_unless_that_is_turned_off() -> None:
    auto = policy_of(calls(WEATHER_TOOL, choice=ToolChoice.AUTO))
    assert auto.token_mask(()) is None
    auto.accept(ord("x"))
    auto.accept(SECTION_BEGIN)
    assert auto.forced() == (CALL_BEGIN,)
    off = policy_of(calls(WEATHER_TOOL, choice=ToolChoice.AUTO, has_grammar=False))
    off.accept(SECTION_BEGIN)
    assert off.forced() == () and off.token_mask(()) is None


@pytest.mark.parametrize("prompt_ids", [NO_THINKING, THINKS, (STOP_ID,)])
def test_without_tools_no_marker_of_a_call_is_allowed(prompt_ids: tuple[int, ...]) -> None:
    policy = policy_of(calls(WEATHER_TOOL, choice=ToolChoice.NONE), prompt_ids)
    markers = {SECTION_BEGIN, SECTION_END, CALL_BEGIN, ARGUMENTS_BEGIN, CALL_END}
    written = write_reply(policy, random_choice(5), 500)
    assert not markers & set(written.token_ids) and written.reply.calls == ()


def test_a_reply_that_may_call_tools_or_answer_in_json_does_one_of_them() -> None:
    constraint = Constraint(answer(WEATHER).answer, calls(WEATHER_TOOL, choice=ToolChoice.AUTO).tools)
    replies = [write_reply(policy_of(constraint), random_choice(seed, ending=0.9), 400).reply for seed in range(20)]
    assert {bool(reply.calls) for reply in replies} == {True, False}
    for reply in replies:
        assert bool(reply.calls) != bool(reply.content)
        jsonschema.validate(json.loads(reply.calls[0].arguments if reply.calls else reply.content), WEATHER)


def test_without_a_stop_token_a_complete_answer_ends_the_reply() -> None:
    policy = policy_of(answer(WEATHER), stop_ids=frozenset())
    written = write_reply(policy, random_choice(0, ending=0.9), 400, stop_ids=frozenset())
    assert written.finish_reason is FinishReason.STOP
    jsonschema.validate(json.loads(written.reply.content), WEATHER)


def test_min_tokens_does_not_make_a_complete_answer_longer() -> None:
    policy = policy_of(answer({"type": "boolean"}), limits=ReplyLimits(min_tokens=50))
    assert write_reply(policy, random_choice(0), 400).reply.content in ("true", "false")
    digits = policy_of(Constraint(AnswerFormat(AnswerForm.REGEX, r"[0-9]*")), limits=ReplyLimits(min_tokens=50))
    assert len(write_reply(digits, random_choice(0), 400).reply.content) >= 49


def test_a_named_tool_is_called_once() -> None:
    declarations = [{"type": "function", "function": {"name": name, "parameters": WEATHER}} for name in ("a", "b")]
    rules = tool_rules(declarations, {"type": "function", "function": {"name": "b"}})
    written = write_reply(policy_of(Constraint(tools=rules)), random_choice(3, ending=0.9), 400)
    assert [call.name for call in written.reply.calls] == ["b"]
    assert text_of(written).endswith("<|tool_call_end|><|tool_calls_section_end|><|im_end|>")


def test_a_reply_that_repeats_calls_ends() -> None:
    written = write_reply(
        policy_of(calls(CLOCK_TOOL)), lambda allowed: min(allowed, key=lambda one: one != CALL_BEGIN), 4096
    )
    assert written.finish_reason is FinishReason.STOP
    assert len(written.reply.calls) == MAX_CALLS


@settings(deadline=None)
@given(st.text(min_size=1, max_size=12).filter(lambda name: name.strip() and "\0" not in name))
def test_any_name_of_a_tool_can_be_written(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return
    written = write_reply(policy_of(calls(Tool(name), is_parallel=False)), random_choice(0), 400)
    assert text_of(written).split("<|tool_call_argument_begin|>")[0].endswith(f"functions.{name}:0")


def raw_policy(pattern: str, limits: ReplyLimits = NO_LIMITS, *stop_ids: int) -> ReplyPolicy:
    """Return the policy of a raw text that matches ``pattern``."""
    grammar = compile_constraint(COMPILER, Constraint(AnswerFormat(AnswerForm.REGEX, pattern)))
    return ReplyPolicy(
        TOKENIZER, Request((5,), 50, Sampling(seed=0), frozenset(stop_ids)), limits, grammar, is_raw=True
    )


def test_a_raw_text_has_the_form_from_its_first_token_and_no_reasoning() -> None:
    for seed in range(20):
        policy = raw_policy("[ab]{3,9}", NO_LIMITS, STOP_ID)
        assert not {THINK, THINK_END} & set(allowed_ids(policy.token_mask(())))
        written = write_reply(policy, random_choice(seed), 50)
        assert re.fullmatch("[ab]{3,9}", written.reply.content)
        assert written.finish_reason is FinishReason.STOP


def test_a_raw_text_has_a_minimum_of_tokens() -> None:
    policy = raw_policy("a*", ReplyLimits(min_tokens=2), STOP_ID)
    for _ in range(2):
        assert STOP_ID not in allowed_ids(policy.token_mask(()))
        policy.accept(TOKENIZER.encode_text("a")[0])
    assert STOP_ID in allowed_ids(policy.token_mask(()))


@follows_advice(
    "the form of the answer allows only the empty text: leave out ignore_eos",
)
def test_a_form_that_allows_the_empty_text_alone_is_refused_without_a_stop_token() -> None:
    with pytest.raises(RequestError, match="allows only the empty text"):
        raw_policy("")
    assert raw_policy("", NO_LIMITS, STOP_ID).forced() == (STOP_ID,)


def test_an_ordinary_token_as_stop_token_ends_a_complete_answer() -> None:
    (point,) = TOKENIZER.encode_text(".")
    policy = raw_policy("a", NO_LIMITS, point)
    policy.accept(TOKENIZER.encode_text("a")[0])
    assert list(policy.forced()) == [point]
    assert policy.accept(point).finish_reason is None  # the sequence ends at its stop token


def test_without_a_grammar_a_reply_that_may_call_one_tool_begins_no_second_call_inside_it() -> None:
    rules = ToolRules((Tool("f"), Tool("g")), is_parallel=False, has_grammar=False)
    policy = policy_of(Constraint(tools=rules))
    policy.accept(SECTION_BEGIN)
    assert list(policy.forced()) == [CALL_BEGIN]
    policy.accept(CALL_BEGIN)
    for token_id in (*TOKENIZER.encode_text("functions.f:0"), ARGUMENTS_BEGIN, *TOKENIZER.encode_text("{}")):
        mask = policy.token_mask(())
        assert mask is not None and not mask.allows(CALL_BEGIN) and mask.allows(token_id)
        policy.accept(token_id)
