"""Tests of ReplyParser: reasoning, content and calls do not depend on text chunks, and text is never a marker."""

import itertools
import json
from collections.abc import Iterator, Sequence
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
from tests.text.replies import CALL, CONTROL_NAMES, SINGULAR_NAMES, Token, call, parse, parts, section, tokens_of

# Markers as tokens and as text, parts of markers, whitespace, and text that occurs between markers.
pieces = st.one_of(
    st.sampled_from([(name, True) for name in sorted(CONTROL_NAMES)]),
    st.tuples(st.sampled_from(sorted(NAMES)), st.just(False)),
    st.tuples(
        st.sampled_from(["<", "<|tool_call", "s_section_begin|>", "<th", "ink>", " ", "\n", "functions.f:0", "{}"]),
        st.just(False),
    ),
    st.tuples(st.text(min_size=1, max_size=3), st.just(False)),
)
replies = st.lists(pieces, max_size=12)
vocabularies = st.sampled_from([CONTROL_NAMES, frozenset[str](), frozenset({"<think>", "</think>"})])


def limited_to(tokens: Sequence[Token], names: frozenset[str]) -> list[Token]:
    return [(piece, control and piece in names) for piece, control in tokens]


def resplit(tokens: Sequence[Token], cuts: Sequence[int]) -> Iterator[Token]:
    """Yield the same reply with its ordinary text joined and split again into the lengths of ``cuts``, repeated."""
    length = itertools.cycle(cuts)
    for control, run in itertools.groupby(tokens, key=lambda token: token[1]):
        if control:
            yield from run
            continue
        text = "".join(piece for piece, _ in run)
        while text:
            size = next(length)
            yield text[:size], False
            text = text[size:]


def join(yielded: Sequence[Part]) -> list[Part]:
    """Return the parts with adjacent texts of one kind joined."""
    result: list[Part] = []
    for part in yielded:
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
    tokens: list[Token], cuts: list[int], in_reasoning: bool, names: frozenset[str]
) -> None:
    tokens = limited_to(tokens, names)
    unsplit = parts(list(resplit(tokens, [10_000])), in_reasoning=in_reasoning, names=names)
    for cut in (cuts, [1]):
        assert join(parts(list(resplit(tokens, cut)), in_reasoning=in_reasoning, names=names)) == join(unsplit)


@given(replies, st.booleans(), vocabularies)
def test_the_reply_parts_keep_all_text_in_order_except_space_and_markers(
    tokens: list[Token], in_reasoning: bool, names: frozenset[str]
) -> None:
    tokens = limited_to(tokens, names)
    kept = "".join(
        part.text if isinstance(part, Reasoning | Content) else part.written_id + part.arguments
        for part in parts(tokens, in_reasoning=in_reasoning, names=names)
        if not isinstance(part, ToolCallHeader | ArgumentsText)  # the complete call has the same text
    )
    assert significant(kept) == significant("".join(piece for piece, _ in tokens))


def significant(text: str) -> str:
    """Return the characters of ``text`` that are no whitespace and occur in no marker."""
    return "".join(character for character in text if not character.isspace() and character not in "".join(NAMES))


@given(replies, st.booleans(), vocabularies)
def test_the_parts_of_a_call_that_has_begun_are_those_of_the_complete_call(
    tokens: list[Token], in_reasoning: bool, names: frozenset[str]
) -> None:
    header: ToolCallHeader | None = None
    written = ""
    for part in parts(limited_to(tokens, names), in_reasoning=in_reasoning, names=names):
        match part:
            case ToolCallHeader():
                assert header is None, "a call begins after the call before has ended"
                header, written = part, ""
            case ArgumentsText(text):
                assert header is not None, "arguments belong to a call"
                written += text
            case ToolCall():
                if header is not None and part.values is not None:
                    assert (part.name, part.arguments) == (header.name, written)
                header = None
            case _:
                assert header is None, "no other text comes within a call"
    assert header is None


@given(replies, st.booleans())
def test_when_markers_are_control_tokens_spelled_markers_are_only_text(tokens: list[Token], in_reasoning: bool) -> None:
    text = [(piece, False) for piece, _ in tokens]
    reply = whole_reply(parts(text, in_reasoning=in_reasoning))
    assert reply.calls == ()
    all_text = "".join(piece for piece, _ in text)
    assert (reply.reasoning, reply.content) == ((all_text, "") if in_reasoning else ("", all_text))


@given(replies, st.booleans(), vocabularies)
def test_a_parsed_call_has_either_values_or_an_error(
    tokens: list[Token], in_reasoning: bool, names: frozenset[str]
) -> None:
    for tool_call in whole_reply(parts(limited_to(tokens, names), in_reasoning=in_reasoning, names=names)).calls:
        assert (tool_call.error is None) == (tool_call.values is not None)
        if tool_call.error is None:
            assert tool_call.name
            assert tool_call.values == json.loads(tool_call.arguments.strip() or "{}")


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.text(alphabet="abc<|>é\n\"'\\ ", max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text("ab_", max_size=3), inner)),
    max_leaves=5,
)
argument_objects = st.dictionaries(st.text("abc_", min_size=1, max_size=4), json_values, max_size=3)
names = st.from_regex(r"[A-Za-z_][\w.\-]{0,12}", fullmatch=True).filter(lambda name: not name.startswith("functions."))
written_calls = st.lists(st.tuples(names, st.integers(0, 400), argument_objects, st.booleans()), min_size=1, max_size=3)


@given(written_calls, st.booleans())
def test_well_formed_calls_are_parsed_like_mlx_lm(
    written: list[tuple[str, int, dict[str, Any], bool]], as_tokens: bool
) -> None:
    calls = [
        call(f"{'functions.' if has_prefix else ''}{name}:{number}", json.dumps(values, ensure_ascii=False))
        for name, number, values, has_prefix in written
    ]
    text = section(*calls)
    reply = parse(text) if as_tokens else whole_reply(parts([(text, False)], names=frozenset()))
    expected = parse_tool_call("".join(calls))
    assert [{"id": c.written_id, "name": c.name, "arguments": c.values} for c in reply.calls] == expected
    assert [c.arguments for c in reply.calls] == [json.dumps(v, ensure_ascii=False) for _, _, v, _ in written]
    assert reply.content == reply.reasoning == ""


def test_a_malformed_call_keeps_its_text() -> None:
    (tool_call,) = parse(section('<|tool_call_begin|>functions.f:7 {"a": 1}<|tool_call_end|>')).calls
    assert (tool_call.written_id, tool_call.arguments) == ("functions.f:7", '{"a": 1}')
    (tool_call,) = parse(section('{"name": "f"}')).calls
    assert (tool_call.written_id, tool_call.arguments) == ("", '{"name": "f"}')


@pytest.mark.parametrize("marker", SINGULAR_NAMES)
def test_a_singular_section_marker_outside_a_section_is_text(marker: str) -> None:
    assert parse(f"<think>R{marker} S</think>C{marker}", in_reasoning=False) == Reply(f"R{marker} S", f"C{marker}", ())


def test_a_singular_marker_spelled_inside_arguments_is_part_of_them() -> None:
    arguments = json.dumps({"text": "".join(SINGULAR_NAMES)})
    (tool_call,) = parse(section(call("functions.f:0", arguments))).calls
    assert tool_call.values == {"text": "".join(SINGULAR_NAMES)}


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("<think>R</think>C", Reply("R", "C", ())),
        ("C<think>D</think>", Reply("", "C<think>D</think>", ())),
        (call("functions.f:0", "{}"), Reply("", call("functions.f:0", "{}"), ())),
        ("C<|tool_calls_section_begin|> D", Reply("", "C<|tool_calls_section_begin|> D", ())),
    ],
)
def test_a_marker_missing_from_the_vocabulary_is_parsed_from_text_where_expected(text: str, reply: Reply) -> None:
    assert whole_reply(parts([(text, False)], names=frozenset())) == reply


def test_arguments_may_contain_a_spelled_call_begin_marker() -> None:
    arguments = '{"a": "<|tool_call_begin|>"}'
    (tool_call,) = whole_reply(parts([(section(call("functions.f:0", arguments)), False)], names=frozenset())).calls
    assert tool_call.arguments == arguments
    assert tool_call.values == {"a": "<|tool_call_begin|>"}


def test_other_control_tokens_become_their_names_in_the_text() -> None:
    yielded = parts([("<think>", True), ("a", False), ("<|im_middle|>", True), ("b", False)])
    assert whole_reply(yielded) == Reply("a<|im_middle|>b", "", ())


def test_text_is_emitted_as_soon_as_it_cannot_begin_a_marker() -> None:
    parser = ReplyParser(frozenset(), in_reasoning=False)
    assert list(parser.text("Say <")) == [Content("Say ")]
    assert list(parser.text("|tool_calls")) == []
    assert list(parser.text(" twice")) == [Content("<|tool_calls twice")]


def test_a_call_is_emitted_when_it_ends_and_not_at_the_end_of_the_reply() -> None:
    parser = ReplyParser(CONTROL_NAMES, in_reasoning=False)
    *tokens, _section_end = tokens_of(CALL)
    yielded = [part for piece, control in tokens for part in (parser.control(piece) if control else parser.text(piece))]
    assert yielded == [ToolCallHeader("f"), ArgumentsText('{"a": 1}'), *parse(CALL).calls]
    assert list(parser.finish()) == []


@given(st.lists(st.text(max_size=4), max_size=6))
@example(["<", "th", "ink", ">"])
def test_all_buffered_text_is_emitted_at_the_end_of_a_reply(texts: list[str]) -> None:
    reply = whole_reply(parts([(text, False) for text in texts]))
    assert reply.content == "".join(texts)
