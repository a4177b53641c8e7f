"""Tests of ReplyParser: reasoning, content and calls do not depend on how its text is split."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.tool_parsers.kimi_k2 import parse_tool_call

from mlx_k2.text.markers import NAMES
from mlx_k2.text.reply_parser import ReplyParser
from mlx_k2.text.reply_parts import ArgumentsText, Content, Part, Reasoning, Reply, ToolCallHeader, whole_reply
from mlx_k2.text.tool_call import ToolCall
from tests.examples import at_least
from tests.text.replies import (
    CALL_SECTION,
    SINGULAR_MARKERS,
    VOCABULARY_MARKERS,
    Token,
    call,
    parse_reply,
    parse_tokens,
    section,
    tokens_of,
)

# Markers as tokens and as text, parts of markers, whitespace, and text that occurs between markers.
pieces = st.one_of(
    st.sampled_from([(name, True) for name in sorted(VOCABULARY_MARKERS)]),
    st.tuples(st.sampled_from(sorted(NAMES)), st.just(False)),
    st.tuples(
        st.sampled_from(["<", "<|tool_call", "s_section_begin|>", "<th", "ink>", " ", "\n", "functions.f:0", "{}"]),
        st.just(False),
    ),
    st.tuples(st.text(min_size=1, max_size=3), st.just(False)),
)
replies = st.lists(pieces, max_size=12)
vocabularies = st.sampled_from([VOCABULARY_MARKERS, frozenset[str](), frozenset({"<think>", "</think>"})])


def limit_control_tokens(tokens: Sequence[Token], control_names: frozenset[str]) -> list[Token]:
    """Return the tokens, with control tokens of other names as ordinary text."""
    return [(text, is_control and text in control_names) for text, is_control in tokens]


def split_again(tokens: Sequence[Token], lengths: Sequence[int]) -> list[Token]:
    """Return the same reply with its ordinary text joined and split into pieces of these lengths, which repeat."""
    sizes = itertools.cycle(lengths)
    result: list[Token] = []
    for is_control, group in itertools.groupby(tokens, key=lambda token: token[1]):
        if is_control:
            result += group
            continue
        text = "".join(part for part, _ in group)
        while text:
            size = next(sizes)
            result.append((text[:size], False))
            text = text[size:]
    return result


def join_texts(parts: Sequence[Part]) -> list[Part]:
    """Return the parts with adjacent texts of one kind joined."""
    result: list[Part] = []
    for part in parts:
        if isinstance(part, Reasoning | Content | ArgumentsText) and result and type(result[-1]) is type(part):
            before = result.pop()
            assert isinstance(before, Reasoning | Content | ArgumentsText)
            result.append(type(part)(before.text + part.text))
        else:
            result.append(part)
    return result


@given(replies, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans(), vocabularies)
@settings(max_examples=at_least(400))
def test_splitting_the_text_differently_gives_the_same_reply_parts(
    tokens: list[Token], lengths: list[int], in_reasoning: bool, control_names: frozenset[str]
) -> None:
    tokens = limit_control_tokens(tokens, control_names)
    unsplit, split, single_characters = (
        join_texts(parse_tokens(split_again(tokens, sizes), in_reasoning=in_reasoning, names=control_names))
        for sizes in ([10_000], lengths, [1])
    )
    assert split == unsplit
    assert single_characters == unsplit


@given(replies, st.booleans(), vocabularies)
def test_the_parts_of_a_reply_have_all_its_text_in_order_except_space_and_characters_of_markers(
    tokens: list[Token], in_reasoning: bool, control_names: frozenset[str]
) -> None:
    tokens = limit_control_tokens(tokens, control_names)
    text = ""
    for part in parse_tokens(tokens, in_reasoning=in_reasoning, names=control_names):
        match part:
            case Reasoning() | Content():
                text += part.text
            case ToolCall():  # has the text of its header and arguments, which came before
                text += part.written_id + part.arguments
    assert significant_characters(text) == significant_characters("".join(text for text, _ in tokens))


def significant_characters(text: str) -> str:
    """Return the characters of ``text`` that are no whitespace and occur in no marker."""
    return "".join(character for character in text if not character.isspace() and character not in "".join(NAMES))


@given(replies, st.booleans(), vocabularies)
def test_the_header_and_arguments_streamed_for_a_call_equal_those_of_the_complete_call(
    tokens: list[Token], in_reasoning: bool, control_names: frozenset[str]
) -> None:
    open_call: ToolCallHeader | None = None
    arguments = ""
    for part in parse_tokens(
        limit_control_tokens(tokens, control_names), in_reasoning=in_reasoning, names=control_names
    ):
        match part:
            case ToolCallHeader():
                assert open_call is None, "a call begins within a call"
                open_call, arguments = part, ""
            case ArgumentsText(text):
                assert open_call is not None, "arguments outside a call"
                arguments += text
            case ToolCall():
                # `broken_call` divides the text of a broken call again
                if open_call is not None and part.values is not None:
                    assert (part.name, part.arguments) == (open_call.name, arguments)
                open_call = None
            case _:
                assert open_call is None, "other text within a call"
    assert open_call is None


@given(replies, st.booleans())
def test_the_spelled_name_of_a_control_token_is_only_text(tokens: list[Token], in_reasoning: bool) -> None:
    reply = whole_reply(parse_tokens([(text, False) for text, _ in tokens], in_reasoning=in_reasoning))
    text = "".join(text for text, _ in tokens)
    assert reply == (Reply(text, "", ()) if in_reasoning else Reply("", text, ()))


@given(replies, st.booleans(), vocabularies)
def test_a_parsed_call_has_either_values_or_an_error(
    tokens: list[Token], in_reasoning: bool, control_names: frozenset[str]
) -> None:
    parts = parse_tokens(limit_control_tokens(tokens, control_names), in_reasoning=in_reasoning, names=control_names)
    for parsed_call in whole_reply(parts).calls:
        assert (parsed_call.error is None) == (parsed_call.values is not None)
        if parsed_call.error is None:
            assert parsed_call.name
            assert parsed_call.values == json.loads(parsed_call.arguments.strip() or "{}")


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.text(alphabet="abc<|>é\n\"'\\ ", max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text("ab_", max_size=3), inner)),
    max_leaves=5,
)
argument_objects = st.dictionaries(st.text("abc_", min_size=1, max_size=4), json_values, max_size=3)
# In an id without the prefix "functions.", a name that begins with it would be read as prefix and name.
tool_names = st.from_regex(r"[A-Za-z_][\w.\-]{0,12}", fullmatch=True).filter(
    lambda name: not name.startswith("functions.")
)
call_ids = st.builds("{}{}:{}".format, st.sampled_from(["functions.", ""]), tool_names, st.integers(0, 400))


@given(st.lists(st.tuples(call_ids, argument_objects), min_size=1, max_size=3), st.booleans())
def test_well_formed_calls_are_parsed_like_mlx_lm(
    ids_and_values: list[tuple[str, dict[str, Any]]], has_control_tokens: bool
) -> None:
    arguments = [json.dumps(values, ensure_ascii=False) for _, values in ids_and_values]
    calls = [call(call_id, text) for (call_id, _), text in zip(ids_and_values, arguments, strict=True)]
    text = section(*calls)
    reply = parse_reply(text) if has_control_tokens else whole_reply(parse_tokens([(text, False)], names=frozenset()))
    calls_as_dicts = [{"id": part.written_id, "name": part.name, "arguments": part.values} for part in reply.calls]
    assert calls_as_dicts == parse_tool_call("".join(calls))
    assert [part.arguments for part in reply.calls] == arguments
    assert reply.content == reply.reasoning == ""


@pytest.mark.parametrize(
    ("text", "written_id", "arguments"),
    [
        ('<|tool_call_begin|>functions.f:7 {"a": 1}<|tool_call_end|>', "functions.f:7", '{"a": 1}'),
        ('{"name": "f"}', "", '{"name": "f"}'),
    ],
)
def test_a_malformed_call_keeps_its_id_and_text(text: str, written_id: str, arguments: str) -> None:
    (parsed_call,) = parse_reply(section(text)).calls
    assert (parsed_call.written_id, parsed_call.arguments) == (written_id, arguments)


@pytest.mark.parametrize("marker", SINGULAR_MARKERS)
def test_a_section_marker_with_call_for_calls_is_text_if_no_call_follows(marker: str) -> None:
    assert parse_reply(f"<think>R{marker} S</think>C{marker}", in_reasoning=False) == Reply(
        f"R{marker} S", f"C{marker}", ()
    )


def test_a_section_marker_with_call_for_calls_inside_arguments_is_part_of_them() -> None:
    arguments = json.dumps({"text": "".join(SINGULAR_MARKERS)})
    (parsed_call,) = parse_reply(section(call("functions.f:0", arguments))).calls
    assert parsed_call.values == {"text": "".join(SINGULAR_MARKERS)}


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("<think>R</think>C", Reply("R", "C", ())),
        ("C<think>D</think>", Reply("", "C<think>D</think>", ())),
        (call("functions.f:0", "{}"), Reply("", call("functions.f:0", "{}"), ())),
        ("C<|tool_calls_section_begin|> D", Reply("", "C<|tool_calls_section_begin|> D", ())),  # no call follows
    ],
)
def test_a_marker_missing_from_the_vocabulary_is_parsed_from_text_where_expected(text: str, reply: Reply) -> None:
    assert whole_reply(parse_tokens([(text, False)], names=frozenset())) == reply


def test_arguments_may_contain_a_spelled_call_begin_marker() -> None:
    arguments = '{"a": "<|tool_call_begin|>"}'
    text = section(call("functions.f:0", arguments))
    (parsed_call,) = whole_reply(parse_tokens([(text, False)], names=frozenset())).calls
    assert parsed_call.arguments == arguments
    assert parsed_call.values == {"a": "<|tool_call_begin|>"}


def test_control_tokens_that_are_no_markers_become_their_names_in_the_text() -> None:
    parts = parse_tokens([("<think>", True), ("a", False), ("<|im_middle|>", True), ("b", False)])
    assert whole_reply(parts) == Reply("a<|im_middle|>b", "", ())


def test_text_is_emitted_as_soon_as_it_cannot_begin_a_marker() -> None:
    parser = ReplyParser(frozenset(), in_reasoning=False)
    assert list(parser.text("Say <")) == [Content("Say ")]
    assert list(parser.text("|tool_calls")) == []
    assert list(parser.text(" twice")) == [Content("<|tool_calls twice")]


def test_a_call_is_emitted_when_it_ends_and_not_at_the_end_of_the_reply() -> None:
    parser = ReplyParser(VOCABULARY_MARKERS, in_reasoning=False)
    *tokens, _section_end = tokens_of(CALL_SECTION)
    parts: list[Part] = []
    for text, is_control in tokens:
        parts += parser.control(text) if is_control else parser.text(text)
    assert parts == [ToolCallHeader("f"), ArgumentsText('{"a": 1}'), *parse_reply(CALL_SECTION).calls]
    assert list(parser.finish()) == []


@given(st.lists(st.text(max_size=4), max_size=6))
@example(["<", "|tool_call_sec"])  # begins a marker that the vocabulary lacks
def test_all_buffered_text_is_emitted_at_the_end_of_a_reply(texts: list[str]) -> None:
    reply = whole_reply(parse_tokens([(text, False) for text in texts]))
    assert reply.content == "".join(texts)
