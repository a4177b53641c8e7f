"""Tests of constrained replies: whatever the logits, a reply follows its grammar or ends with FinishReason.LENGTH."""

import json
import re
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_k2.coordinator.reply_policy import ReplyLimits, ReplyPolicy
from mlx_k2.errors import RequestFailed
from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.drafter import NgramDrafter
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.scheduling.sequence import Sequence, SharedPrefix
from mlx_k2.text.constraint import AnswerForm, AnswerFormat, Constraint, Tool, ToolChoice, ToolRules, tool_rules
from mlx_k2.text.grammar import GrammarCompiler
from mlx_k2.text.reply_grammar import MAX_CALLS, compile_constraint
from tests.coordinator.constrained import (
    COMPILER,
    INSTANT_PROMPT,
    STOP_ID,
    THINK_END_ID,
    THINK_ID,
    TOKENIZER,
    GeneratedReply,
    allowed_ids,
    generate_reply,
    policy_of,
    random_choice,
)
from tests.coordinator.random_schemas import DEFINITIONS, schemas
from tests.coordinator.schemas import answer_constraint

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
COSTLY_PATTERN = "(c?){200}c{200}"
"""A regular expression that exceeds the grammar's limit of work per token after a few letters c."""
REASONING_PROMPT = (STOP_ID, THINK_ID)
"""A prompt after which the reply begins with reasoning."""

ending_probabilities = st.sampled_from([0.0, 0.5, 0.95])
few_examples = settings() if settings.get_current_profile_name() != "fixed" else settings(max_examples=30)
"""Settings of the properties that generate long replies: 30 examples in the profile of `make test` and `make check`,
all in other profiles."""


def tools_constraint(*tools: Tool, choice: ToolChoice = ToolChoice.REQUIRED, **rules: Any) -> Constraint:
    """Return the constraint of a reply that may, or by default must, call these tools."""
    return Constraint(tools=ToolRules(tools, choice, **rules))


def text_of(generated: GeneratedReply) -> str:
    """Return the text of all tokens of a reply, control tokens by their names."""
    return b"".join(TOKENIZER.token_bytes(number) for number in generated.token_ids).decode(errors="replace")


@few_examples
@given(schemas, st.integers(0, 2**32), ending_probabilities)
def test_whatever_the_logits_an_answer_is_valid_or_ends_with_length(schema: Any, seed: int, ending: float) -> None:
    generated = generate_reply(policy_of(answer_constraint(schema)), random_choice(seed, ending=ending), max_tokens=300)
    if generated.finish_reason is FinishReason.STOP:
        jsonschema.validate(json.loads(generated.reply.content), schema)
        assert generated.token_ids[-1] == STOP_ID
        without_strings = re.sub(r'"(\\.|[^"\\])*"', '""', generated.reply.content)
        assert not re.search(r"[,:{\[]\s|\s[}\]]", without_strings), "white space outside strings"
    else:
        assert generated.finish_reason is FinishReason.LENGTH and len(generated.token_ids) == 300


@given(
    st.sampled_from([r"[a-c]{2,5}-[0-9]+", r"(yes|no|maybe)( please)?", r"([a-z]+ ){0,3}end", "ä+ö?", r'"[^"]*"']),
    st.integers(0, 2**32),
)
def test_whatever_the_logits_an_answer_matches_its_regular_expression(pattern: str, seed: int) -> None:
    constraint = Constraint(answer=AnswerFormat(AnswerForm.REGEX, pattern))
    generated = generate_reply(policy_of(constraint), random_choice(seed), max_tokens=60)
    if generated.finish_reason is FinishReason.STOP:
        assert re.fullmatch(pattern, generated.reply.content, re.DOTALL)
    else:
        assert generated.finish_reason is FinishReason.LENGTH


@given(st.integers(0, 2**32))
def test_whatever_the_logits_an_answer_follows_its_lark_grammar(seed: int) -> None:
    sums = 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,3}/'
    constraint = Constraint(answer=AnswerFormat(AnswerForm.LARK, sums))
    generated = generate_reply(policy_of(constraint), random_choice(seed), max_tokens=80)
    if generated.finish_reason is FinishReason.STOP:
        assert re.fullmatch(r"[0-9+()]+", generated.reply.content)
        eval(re.sub(r"\b0+(?=\d)", "", generated.reply.content), {"__builtins__": {}})  # Python refuses leading zeros
    else:
        assert generated.finish_reason is FinishReason.LENGTH


@few_examples
@given(st.lists(schemas, min_size=1, max_size=3), st.integers(0, 2**32), ending_probabilities, st.booleans())
def test_whatever_the_logits_required_calls_are_valid_or_the_reply_ends_with_length(
    value_schemas: list[Any], seed: int, ending: float, is_parallel: bool
) -> None:
    parameters = {
        f"tool-{index}.a": {
            "type": "object",
            "properties": {"v": value_schema},
            "required": ["v"],
            "$defs": DEFINITIONS,
        }
        for index, value_schema in enumerate(value_schemas)
    }
    constraint = tools_constraint(*(Tool(name, schema) for name, schema in parameters.items()), is_parallel=is_parallel)
    generated = generate_reply(policy_of(constraint), random_choice(seed, ending=ending))
    complete_calls = [call for call in generated.reply.calls if call.error is None]
    for call in complete_calls:
        jsonschema.validate(json.loads(call.arguments), parameters[call.name])
    if generated.finish_reason is FinishReason.STOP:
        assert len(complete_calls) == len(generated.reply.calls) >= 1
        assert is_parallel or len(complete_calls) == 1
        assert [call.written_id for call in complete_calls] == [
            f"functions.{call.name}:{number}" for number, call in enumerate(complete_calls)
        ]
        assert generated.reply.content == ""
    else:
        assert generated.finish_reason is FinishReason.LENGTH


@few_examples
@given(
    st.one_of(schemas.map(answer_constraint), st.just(tools_constraint(WEATHER_TOOL, CLOCK_TOOL))),
    st.integers(0, 2**32),
    st.data(),
)
def test_a_mask_after_drafts_is_the_mask_after_the_same_accepted_tokens(
    constraint: Constraint, seed: int, data: st.DataObject
) -> None:
    masks: list[tuple[list[int], list[int]]] = []  # the tokens before each mask, and the tokens that it allows
    generate_reply(
        policy_of(constraint),
        random_choice(seed, ending=0.7),
        max_tokens=80,
        on_mask=lambda token_ids, mask: masks.append((token_ids.copy(), allowed_ids(mask))),
    )
    assume(masks)
    start = data.draw(st.integers(0, len(masks) - 1))
    accepted, _ = masks[start]
    policy = policy_of(constraint)
    for token_id in accepted:
        policy.accept(token_id)
    drafts: list[int] = []
    for token_ids, allowed in masks[start:]:
        following = token_ids[len(accepted) :]
        for token_id in following[len(drafts) :]:
            if not policy.may_draft(drafts, token_id):
                assert TOKENIZER.is_special(token_id)
                return
            drafts.append(token_id)
        assert allowed_ids(policy.token_mask(drafts)) == allowed


def test_no_draft_token_is_a_control_token_or_one_that_the_grammar_excludes() -> None:
    policy = policy_of(answer_constraint(WEATHER), REASONING_PROMPT)
    assert policy.may_draft((), ord("x"))
    assert not policy.may_draft((), THINK_END_ID)
    policy.accept(THINK_END_ID)
    assert [letter for letter in 'x{"]' if policy.may_draft((), ord(letter))] == ["{"]
    assert policy.may_draft([ord("{")], ord('"'))
    assert not policy.may_draft([ord("{")], ord("}"))


def test_a_draft_token_that_exceeds_the_limits_of_the_grammar_is_dropped_and_the_answer_continues() -> None:
    policy = policy_of(Constraint(AnswerFormat(AnswerForm.REGEX, f"bbb(bab|{COSTLY_PATTERN})")))
    request = Request((*b"bbbcccccc", *INSTANT_PROMPT), 99, Sampling(seed=0), frozenset({STOP_ID}))
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
    assert 0 < len(drafts) < 6  # the prompt has c six times after bbb
    assert sequence.error is None
    assert sequence.append_sampled(0, SampledToken(ord("b")), 1)
    assert sequence.finish_reason is FinishReason.STOP
    assert list(sequence.token_ids[sequence.num_prompt : -1]) == [*b"bbbbab"]


def test_a_reply_that_exceeds_the_limits_of_its_grammar_ends_no_other_reply_with_this_grammar() -> None:
    constraint = Constraint(AnswerFormat(AnswerForm.REGEX, f"[ab]{{3}}(bab|{COSTLY_PATTERN})"))
    failing, earlier, later = (policy_of(constraint) for _ in range(3))
    for policy in (failing, earlier):
        for token_id in b"abb":
            policy.accept(token_id)
    with pytest.raises(RequestFailed, match="its grammar cannot follow the answer"):
        for _ in range(50):
            failing.accept(ord("c"))
            failing.token_mask(())
    for token_id in b"abb":
        later.accept(token_id)
    for policy in (earlier, later):
        policy.accept(ord("b"))
        assert policy.forced() == [*b"ab"]


def test_replies_of_eight_threads_with_one_compiler_equal_those_of_one_thread() -> None:
    constraints = [
        answer_constraint(WEATHER),
        tools_constraint(WEATHER_TOOL, CLOCK_TOOL),
        answer_constraint({"type": "array"}),
        answer_constraint({"const": 5}),
    ]

    def replies(compiler: GrammarCompiler, first_seed: int) -> list[list[int]]:
        """Return the tokens of a reply to each constraint, from the one with the index ``first_seed`` on."""
        token_ids = []
        for seed in range(first_seed, first_seed + len(constraints)):
            grammar = compile_constraint(compiler, constraints[seed % len(constraints)])
            request = Request(INSTANT_PROMPT, 300, Sampling(seed=0), frozenset({STOP_ID}))
            policy = ReplyPolicy(TOKENIZER, request, grammar=grammar)
            token_ids.append(generate_reply(policy, random_choice(seed), max_tokens=60).token_ids)
        return token_ids

    compiler, num_threads = GrammarCompiler(TOKENIZER), 8
    barrier = threading.Barrier(num_threads)

    def replies_of_thread(first_seed: int) -> list[list[int]]:
        barrier.wait(60)  # all need the vocabulary's tables at once
        return replies(compiler, first_seed)

    with ThreadPoolExecutor(num_threads) as pool:
        results = list(pool.map(replies_of_thread, range(num_threads), timeout=60))
    assert results == [replies(COMPILER, first_seed) for first_seed in range(num_threads)]


def test_tokens_without_an_alternative_are_forced() -> None:
    def refuse_choice(_: object) -> NoReturn:
        raise AssertionError("a token was not forced")

    generated = generate_reply(policy_of(tools_constraint(CLOCK_TOOL, is_parallel=False)), refuse_choice)
    assert text_of(generated) == (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.mcp__clock-1.x:0<|tool_call_argument_begin|>{}"
        "<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
    )


def test_the_number_of_a_call_follows_the_calls_of_the_prompt_unless_the_rules_have_a_first_number() -> None:
    prompt = (CALL_BEGIN, ARGUMENTS_BEGIN, CALL_END, CALL_BEGIN, ARGUMENTS_BEGIN, CALL_END, *INSTANT_PROMPT)
    for first_number, expected in ((None, 2), (80, 80)):
        constraint = tools_constraint(CLOCK_TOOL, is_parallel=False, first_number=first_number)
        generated = generate_reply(policy_of(constraint, prompt), random_choice(0))
        assert [call.written_id for call in generated.reply.calls] == [f"functions.mcp__clock-1.x:{expected}"]


def test_reasoning_comes_before_a_required_call_and_an_answer_in_json() -> None:
    for constraint in (tools_constraint(WEATHER_TOOL), answer_constraint(WEATHER)):
        policy = policy_of(constraint, REASONING_PROMPT)
        for token_id in (ord("h"), ord("m"), SECTION_END, ord("!")):  # a stray marker does not end the reasoning
            assert policy.forced() == ()
            mask = policy.token_mask(())
            assert mask is not None and not mask.allows(STOP_ID), "the reply may end inside the reasoning"
            if mask.allows(token_id):
                policy.accept(token_id)
        policy.accept(THINK_END_ID)
        generated = generate_reply(policy, random_choice(1, ending=0.9))
        assert generated.finish_reason is FinishReason.STOP
        assert generated.reply.calls or json.loads(generated.reply.content)


def test_the_model_may_begin_reasoning_before_a_constrained_answer() -> None:
    policy = policy_of(answer_constraint(WEATHER), (STOP_ID,))
    assert allowed_ids(policy.token_mask(())) == sorted([ord("{"), THINK_ID])
    policy.accept(THINK_ID)
    assert ord("x") in allowed_ids(policy.token_mask(()))
    policy.accept(THINK_END_ID)
    assert policy.forced()[:1] == [ord("{")]


def test_a_tool_section_that_begins_inside_the_reasoning_is_constrained() -> None:
    policy = policy_of(tools_constraint(WEATHER_TOOL), REASONING_PROMPT)
    policy.accept(SECTION_BEGIN)
    generated = generate_reply(policy, random_choice(1, ending=0.9))
    assert generated.reply.calls and not any(call.error for call in generated.reply.calls)


def test_an_optional_tool_section_is_constrained_unless_the_tool_grammar_is_off() -> None:
    with_grammar = policy_of(tools_constraint(WEATHER_TOOL, choice=ToolChoice.AUTO))
    assert with_grammar.token_mask(()) is None
    with_grammar.accept(ord("x"))
    with_grammar.accept(SECTION_BEGIN)
    assert with_grammar.forced() == (CALL_BEGIN,)
    without_grammar = policy_of(tools_constraint(WEATHER_TOOL, choice=ToolChoice.AUTO, has_grammar=False))
    without_grammar.accept(SECTION_BEGIN)
    assert without_grammar.forced() == () and without_grammar.token_mask(()) is None


@pytest.mark.parametrize("prompt_ids", [INSTANT_PROMPT, REASONING_PROMPT, (STOP_ID,)])
def test_with_the_tool_choice_none_no_marker_of_a_call_is_allowed(prompt_ids: tuple[int, ...]) -> None:
    policy = policy_of(tools_constraint(WEATHER_TOOL, choice=ToolChoice.NONE), prompt_ids)
    markers = {SECTION_BEGIN, SECTION_END, CALL_BEGIN, ARGUMENTS_BEGIN, CALL_END}
    generated = generate_reply(policy, random_choice(5), max_tokens=500)
    assert not markers & set(generated.token_ids) and generated.reply.calls == ()


def test_a_reply_that_may_call_tools_or_answer_in_json_does_one_of_them() -> None:
    constraint = Constraint(
        answer_constraint(WEATHER).answer, tools_constraint(WEATHER_TOOL, choice=ToolChoice.AUTO).tools
    )
    replies = [generate_reply(policy_of(constraint), random_choice(seed, ending=0.9)).reply for seed in range(20)]
    assert {bool(reply.calls) for reply in replies} == {True, False}
    for reply in replies:
        assert bool(reply.calls) != bool(reply.content)
        jsonschema.validate(json.loads(reply.calls[0].arguments if reply.calls else reply.content), WEATHER)


def test_without_a_stop_token_a_complete_answer_ends_the_reply() -> None:
    policy = policy_of(answer_constraint(WEATHER), stop_ids=frozenset())
    generated = generate_reply(policy, random_choice(0, ending=0.9), stop_ids=frozenset())
    assert generated.finish_reason is FinishReason.STOP
    jsonschema.validate(json.loads(generated.reply.content), WEATHER)


def test_min_tokens_holds_only_where_the_grammar_allows_a_longer_answer() -> None:
    limits = ReplyLimits(min_tokens=50)
    boolean = policy_of(answer_constraint({"type": "boolean"}), limits=limits)
    assert generate_reply(boolean, random_choice(0)).reply.content in ("true", "false")
    digits = policy_of(Constraint(AnswerFormat(AnswerForm.REGEX, r"[0-9]*")), limits=limits)
    assert len(generate_reply(digits, random_choice(0)).reply.content) >= 49  # and the stop token


def test_a_named_tool_is_called_once() -> None:
    declarations = [{"type": "function", "function": {"name": name, "parameters": WEATHER}} for name in ("a", "b")]
    rules = tool_rules(declarations, {"type": "function", "function": {"name": "b"}})
    generated = generate_reply(policy_of(Constraint(tools=rules)), random_choice(3, ending=0.9))
    assert [call.name for call in generated.reply.calls] == ["b"]
    assert text_of(generated).endswith("<|tool_call_end|><|tool_calls_section_end|><|im_end|>")


def test_a_reply_that_repeats_calls_ends_after_the_largest_number_of_calls() -> None:
    def prefer_call(allowed: Iterable[int]) -> int:
        return CALL_BEGIN if CALL_BEGIN in allowed else min(allowed)

    generated = generate_reply(policy_of(tools_constraint(CLOCK_TOOL)), prefer_call, max_tokens=4096)
    assert generated.finish_reason is FinishReason.STOP
    assert len(generated.reply.calls) == MAX_CALLS


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(str.strip))
def test_any_name_of_a_tool_can_be_generated(name: str) -> None:
    generated = generate_reply(policy_of(tools_constraint(Tool(name), is_parallel=False)), random_choice(0))
    assert text_of(generated).split("<|tool_call_argument_begin|>")[0].endswith(f"functions.{name}:0")


def test_without_a_grammar_a_reply_that_may_call_one_tool_begins_no_second_call_inside_the_first() -> None:
    constraint = tools_constraint(Tool("f"), Tool("g"), choice=ToolChoice.AUTO, is_parallel=False, has_grammar=False)
    policy = policy_of(constraint)
    policy.accept(SECTION_BEGIN)
    assert list(policy.forced()) == [CALL_BEGIN]
    policy.accept(CALL_BEGIN)
    for token_id in (*TOKENIZER.encode_text("functions.f:0"), ARGUMENTS_BEGIN, *TOKENIZER.encode_text("{}")):
        mask = policy.token_mask(())
        assert mask is not None and not mask.allows(CALL_BEGIN) and mask.allows(token_id)
        policy.accept(token_id)
