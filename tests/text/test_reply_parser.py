"""A reply comes apart into reasoning, content and calls, however it is cut, and text never passes for a marker."""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlx_lm.tool_parsers.kimi_k2 import parse_tool_call

from mlx_k2.text.markers import NAMES
from mlx_k2.text.reply_parser import Content, Part, Reasoning, Reply, ReplyParser, whole_reply
from tests.text.fixtures import tokenizer

IN_VOCABULARY = frozenset(name for name in NAMES if name in tokenizer().special_ids)
MARKERS = "(" + "|".join(map(re.escape, sorted(IN_VOCABULARY))) + ")"
SINGULAR = sorted(NAMES.keys() - IN_VOCABULARY)

Token = tuple[str, bool]
"""A piece of a reply, and whether it is a control token."""


def parts(tokens: Sequence[Token], *, in_reasoning: bool = False, names: frozenset[str] = IN_VOCABULARY) -> list[Part]:
    parser = ReplyParser(names, in_reasoning=in_reasoning)
    pieces = [part for piece, control in tokens for part in (parser.control(piece) if control else parser.text(piece))]
    return [*pieces, *parser.finish()]


def tokens_of(text: str) -> list[Token]:
    """A reply as its vocabulary draws it: each marker of the vocabulary one control token."""
    return [(piece, piece in IN_VOCABULARY) for piece in re.split(MARKERS, text) if piece]


def parsed(text: str, *, in_reasoning: bool = False) -> Reply:
    return whole_reply(parts(tokens_of(text), in_reasoning=in_reasoning))


def section(*calls: str) -> str:
    return f"<|tool_calls_section_begin|>{''.join(calls)}<|tool_calls_section_end|>"


def call(written_id: str, arguments: str) -> str:
    return f"<|tool_call_begin|>{written_id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


CALL = section(call("functions.f:0", '{"a": 1}'))

# Markers as tokens and as text, beginnings of markers, space, and what stands between.
pieces = st.one_of(
    st.sampled_from([(name, True) for name in sorted(IN_VOCABULARY)]),
    st.tuples(st.sampled_from(sorted(NAMES)), st.just(False)),
    st.tuples(
        st.sampled_from(["<", "<|tool_call", "s_section_begin|>", "<th", "ink>", " ", "\n", "functions.f:0", "{}"]),
        st.just(False),
    ),
    st.tuples(st.text(min_size=1, max_size=3), st.just(False)),
)
replies = st.lists(pieces, max_size=12)
vocabularies = st.sampled_from([IN_VOCABULARY, frozenset[str](), frozenset({"<think>", "</think>"})])


def in_vocabulary(tokens: Sequence[Token], names: frozenset[str]) -> list[Token]:
    return [(piece, control and piece in names) for piece, control in tokens]


def recut(tokens: Sequence[Token], cuts: Sequence[int]) -> Iterator[Token]:
    """The same reply with its ordinary text joined, then cut after as many characters as ``cuts`` says in turn."""
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


def joined(found: Sequence[Part]) -> list[Part]:
    """Parts with neighbouring texts of one kind put together."""
    result: list[Part] = []
    for part in found:
        if isinstance(part, Reasoning | Content) and result and type(result[-1]) is type(part):
            before = result.pop()
            assert isinstance(before, Reasoning | Content)
            result.append(type(part)(before.text + part.text))
        else:
            result.append(part)
    return result


@given(replies, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans(), vocabularies)
def test_any_cut_of_the_text_gives_the_same_parts(
    tokens: list[Token], cuts: list[int], in_reasoning: bool, names: frozenset[str]
) -> None:
    tokens = in_vocabulary(tokens, names)
    whole = parts(list(recut(tokens, [10_000])), in_reasoning=in_reasoning, names=names)
    for cut in (cuts, [1]):
        assert joined(parts(list(recut(tokens, cut)), in_reasoning=in_reasoning, names=names)) == joined(whole)


@given(replies, st.booleans(), vocabularies)
def test_nothing_is_lost_nor_moved_but_space_and_markers(
    tokens: list[Token], in_reasoning: bool, names: frozenset[str]
) -> None:
    tokens = in_vocabulary(tokens, names)
    kept = "".join(
        part.text if isinstance(part, Reasoning | Content) else part.written_id + part.arguments
        for part in parts(tokens, in_reasoning=in_reasoning, names=names)
    )
    assert telling(kept) == telling("".join(piece for piece, _ in tokens))


def telling(text: str) -> str:
    """The characters that neither are space nor occur in a marker."""
    return "".join(character for character in text if not character.isspace() and character not in "".join(NAMES))


@given(replies, st.booleans())
def test_where_markers_are_tokens_text_alone_makes_no_call_and_ends_no_reasoning(
    tokens: list[Token], in_reasoning: bool
) -> None:
    text = [(piece, False) for piece, _ in tokens]
    reply = whole_reply(parts(text, in_reasoning=in_reasoning))
    assert reply.calls == ()
    everything = "".join(piece for piece, _ in text)
    assert (reply.reasoning, reply.content) == ((everything, "") if in_reasoning else ("", everything))


@given(replies, st.booleans(), vocabularies)
def test_a_call_can_be_run_or_says_why_not(tokens: list[Token], in_reasoning: bool, names: frozenset[str]) -> None:
    for found in whole_reply(parts(in_vocabulary(tokens, names), in_reasoning=in_reasoning, names=names)).calls:
        assert (found.error is None) == (found.values is not None)
        if found.error is None:
            assert found.name
            assert found.values == json.loads(found.arguments.strip() or "{}")


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.text(alphabet="abc<|>é\n\"'\\ ", max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text("ab_", max_size=3), inner)),
    max_leaves=5,
)
argument_objects = st.dictionaries(st.text("abc_", min_size=1, max_size=4), json_values, max_size=3)
names = st.from_regex(r"[A-Za-z_][\w.\-]{0,12}", fullmatch=True).filter(lambda name: not name.startswith("functions."))
written_calls = st.lists(st.tuples(names, st.integers(0, 400), argument_objects, st.booleans()), min_size=1, max_size=3)


@given(written_calls, st.booleans())
def test_well_formed_calls_are_read_as_mlx_lm_reads_them(
    written: list[tuple[str, int, dict[str, Any], bool]], as_tokens: bool
) -> None:
    calls = [
        call(f"{'functions.' if full else ''}{name}:{number}", json.dumps(values, ensure_ascii=False))
        for name, number, values, full in written
    ]
    text = section(*calls)
    reply = parsed(text) if as_tokens else whole_reply(parts([(text, False)], names=frozenset()))
    expected = parse_tool_call("".join(calls))
    assert [{"id": c.written_id, "name": c.name, "arguments": c.values} for c in reply.calls] == expected
    assert [c.arguments for c in reply.calls] == [json.dumps(v, ensure_ascii=False) for _, _, v, _ in written]
    assert reply.content == reply.reasoning == ""


# What broke other engines: the reply, whether the prompt opened the reasoning, and what is to come out of it.
PITFALLS = {
    "K2 Thinking writes <think> itself": ("<think>R</think>C", False, "R", "C", []),
    "K2.5's prompt opened it": ("R</think>C", True, "R", "C", []),
    "K2.5 writes it again (vLLM #32216: a leading <think> is optional)": ("\n<think>R</think>C", True, "R", "C", []),
    "instant mode: the prompt closed it": ("C", False, "", "C", []),
    "space before <think>": (" \n<think>R</think>C", False, "R", "C", []),
    "space before an answer stays": (" C", False, "", " C", []),
    "nothing but space": (" \n", False, "", " \n", []),
    "a section ends the reasoning (vLLM #32216, #34955)": (f"<think>R{CALL}", False, "R", "", ["f"]),
    "and in K2.5 too": (f"R{CALL}", True, "R", "", ["f"]),
    "a call in thinking, then </think> (Kimi-K2 #89, ik_llama.cpp #955, exo #1256)": (
        f"<think>R{CALL}</think>C",
        False,
        "R",
        "C",
        ["f"],
    ),
    "a second thought": ("<think>R</think>C<think>S</think>D", False, "RS", "CD", []),
    "</think> without <think>": ("C</think>D", False, "", "CD", []),
    "the reply ends in thinking": ("<think>R", False, "R", "", []),
    "content before calls": (f"<think></think>C\n{CALL}", False, "", "C\n", ["f"]),
    "singular section markers (tinker-cookbook)": (
        "<think>R</think><|tool_call_section_begin|>\n" + call("functions.f:0", "{}") + "<|tool_call_section_end|>",
        False,
        "R",
        "",
        ["f"],
    ),
    "no section around a call": ("C" + call("functions.f:0", "{}") + "D", False, "", "CD", ["f"]),
    "space everywhere": (
        section("\n", call(" functions.f:0 ", ' {"a": 1}\n'), "\n ", call("functions.g:1", "{}"), "\n"),
        False,
        "",
        "",
        ["f", "g"],
    ),
    "hyphens and dots in names (SGLang)": (section(call("functions.a-b.c_d:12", "{}")), False, "", "", ["a-b.c_d"]),
    "a name with a colon": (section(call("functions.a:1:2", "{}")), False, "", "", ["a:1"]),
    "no functions. (SGLang)": (section(call("f:0", "{}")), False, "", "", ["f"]),
    "no number": (section(call("functions.f", "{}")), False, "", "", ["f"]),
    "no arguments": (section(call("functions.f:0", "")), False, "", "", ["f"]),
    "a call's first marker is missing": (
        section("functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"),
        False,
        "",
        "",
        ["f"],
    ),
    "a call's last marker is missing": (
        section("<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}", call("functions.g:1", "{}")),
        False,
        "",
        "",
        ["f", "g"],
    ),
    "the section's last marker is missing": (CALL.removesuffix("<|tool_calls_section_end|>"), False, "", "", ["f"]),
    "two sections": (CALL + CALL, False, "", "", ["f", "f"]),
    "an empty section": (f"C{section()}", False, "", "C", []),
}


@pytest.mark.parametrize(("text", "in_reasoning", "reasoning", "content", "calls"), PITFALLS.values(), ids=PITFALLS)
def test_what_broke_other_engines_is_read(
    text: str, in_reasoning: bool, reasoning: str, content: str, calls: list[str]
) -> None:
    reply = parsed(text, in_reasoning=in_reasoning)
    assert (reply.reasoning, reply.content) == (reasoning, content)
    assert [found.name for found in reply.calls] == calls
    assert [found.error for found in reply.calls] == [None] * len(calls)


MALFORMED = {
    "arguments cut short": (section(call("functions.f:0", '{"a": ')), "f", "the arguments are no JSON: "),
    "arguments that are a list": (section(call("functions.f:0", "[1]")), "f", "the arguments are no JSON object"),
    "arguments in Python's spelling": (
        section(call("functions.f:0", "{'a': None}")),
        "f",
        "the arguments are no JSON: ",
    ),
    "NaN": (section(call("functions.f:0", '{"a": NaN}')), "f", "the arguments are no JSON: "),
    "half a surrogate pair": (section(call("functions.f:0", '{"a": "\\ud800"}')), "f", "the arguments are no JSON: "),
    "deep arguments": (section(call("functions.f:0", '{"a":' + "[" * 100_000)), "f", "nested too deep"),
    "no marker before the arguments": (
        section('<|tool_call_begin|>functions.f:0 {"a": 1}<|tool_call_end|>'),
        "f",
        "it has no <|tool_call_argument_begin|>",
    ),
    "a number for an id (Kimi-K2 #89)": (section(call("3", "{}")), "", "its id, '3', names no tool"),
    "a UUID for an id (Kimi-K2 #89)": (
        section(call("0cb1e8a4-7a0e-4a0b-9d3b-6f1f0d8b6f11", "{}")),
        "",
        "names no tool",
    ),
    "no id": (section(call(" ", "{}")), "", "its id, '', names no tool"),
    "text in a section": (section('{"name": "f"}'), "", "it has no <|tool_call_argument_begin|>"),
    "the reply ends in the id": ("<|tool_call_begin|>functions.f", "", "the reply ended inside the call"),
    "the reply ends in the arguments": (
        '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}',
        "f",
        "the reply ended inside the call",
    ),
}


@pytest.mark.parametrize(("text", "name", "error"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_call_becomes_an_error_that_says_what_to_write(text: str, name: str, error: str) -> None:
    (found,) = parsed(text).calls
    assert found.name == name
    assert found.values is None
    assert found.error is not None
    assert found.error.startswith("The call was not run: ")
    assert error in found.error
    assert "functions.NAME:NUMBER" in found.error
    assert len(found.error) < 400


def test_a_malformed_call_keeps_what_the_model_wrote() -> None:
    (found,) = parsed(section('<|tool_call_begin|>functions.f:7 {"a": 1}<|tool_call_end|>')).calls
    assert (found.written_id, found.arguments) == ("functions.f:7", '{"a": 1}')
    (found,) = parsed(section('{"name": "f"}')).calls
    assert (found.written_id, found.arguments) == ("", '{"name": "f"}')


@pytest.mark.parametrize("marker", SINGULAR)
def test_a_quoted_section_marker_stays_text(marker: str) -> None:
    assert parsed(f"<think>R{marker} S</think>C{marker}", in_reasoning=False) == Reply(f"R{marker} S", f"C{marker}", ())


def test_a_singular_marker_inside_arguments_is_part_of_them() -> None:
    arguments = json.dumps({"text": "".join(SINGULAR)})
    (found,) = parsed(section(call("functions.f:0", arguments))).calls
    assert found.values == {"text": "".join(SINGULAR)}


def test_other_control_tokens_read_as_their_names() -> None:
    found = parts([("<think>", True), ("a", False), ("<|im_middle|>", True), ("b", False)])
    assert whole_reply(found) == Reply("a<|im_middle|>b", "", ())


def test_text_is_handed_on_as_soon_as_no_marker_can_begin_in_it() -> None:
    parser = ReplyParser(frozenset(), in_reasoning=False)
    assert list(parser.text("Say <")) == [Content("Say ")]
    assert list(parser.text("|tool_calls")) == []
    assert list(parser.text(" twice")) == [Content("<|tool_calls twice")]


def test_a_call_is_handed_on_when_it_ends_and_not_when_the_reply_does() -> None:
    parser = ReplyParser(IN_VOCABULARY, in_reasoning=False)
    *tokens, _section_end = tokens_of(CALL)
    found = [part for piece, control in tokens for part in (parser.control(piece) if control else parser.text(piece))]
    assert found == list(parsed(CALL).calls)
    assert list(parser.finish()) == []


@given(st.lists(st.text(max_size=4), max_size=6))
@example(["<", "th", "ink", ">"])
def test_nothing_stays_behind_when_a_reply_ends(texts: list[str]) -> None:
    reply = whole_reply(parts([(text, False) for text in texts]))
    assert reply.content == "".join(texts)
