"""Tests of replies that broke other engines, each with its public issue where one exists."""

import pytest

from tests.text.replies import CALL_SECTION, call, parse_reply, section

# The reply, whether the prompt opened the reasoning, and the expected reasoning, content and call names.
PITFALLS = {
    "K2 Thinking writes <think> itself": ("<think>R</think>C", False, "R", "C", []),
    "K2.5's prompt ends with <think>": ("R</think>C", True, "R", "C", []),
    "K2.5 writes <think> again (vLLM #32216)": (
        "\n<think>R</think>C",
        True,
        "R",
        "C",
        [],
    ),
    "instant mode: the prompt ends with </think>": ("C", False, "", "C", []),
    "space before <think>": (" \n<think>R</think>C", False, "R", "C", []),
    "space before an answer stays": (" C", False, "", " C", []),
    "nothing but space": (" \n", False, "", " \n", []),
    "a section ends the reasoning (vLLM #32216, #34955)": (f"<think>R{CALL_SECTION}", False, "R", "", ["f"]),
    "a section ends the reasoning that K2.5's prompt opened": (f"R{CALL_SECTION}", True, "R", "", ["f"]),
    "a call in the reasoning, then </think> (Kimi-K2 #89, ik_llama.cpp #955, exo #1256)": (
        f"<think>R{CALL_SECTION}</think>C",
        False,
        "R",
        "C",
        ["f"],
    ),
    "an answer after a call in the reasoning": (f"<think>R{CALL_SECTION}C", False, "R", "C", ["f"]),
    "a second block of reasoning": ("<think>R</think>C<think>S</think>D", False, "RS", "CD", []),
    "</think> without <think>": ("C</think>D", False, "", "CD", []),
    "the reply ends in the reasoning": ("<think>R", False, "R", "", []),
    "content before calls": (f"<think></think>C\n{CALL_SECTION}", False, "", "C\n", ["f"]),
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
    "an id without the prefix functions. (SGLang)": (section(call("f:0", "{}")), False, "", "", ["f"]),
    "an id without a number": (section(call("functions.f", "{}")), False, "", "", ["f"]),
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
    "a call's last marker is missing, and the answer continues": (
        section("<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}") + "C",
        False,
        "",
        "C",
        ["f"],
    ),
    "the section's last marker is missing": (
        CALL_SECTION.removesuffix("<|tool_calls_section_end|>"),
        False,
        "",
        "",
        ["f"],
    ),
    "two sections": (CALL_SECTION + CALL_SECTION, False, "", "", ["f", "f"]),
    "an empty section": (f"C{section()}", False, "", "C", []),
}


@pytest.mark.parametrize(("text", "in_reasoning", "reasoning", "content", "calls"), PITFALLS.values(), ids=PITFALLS)
def test_replies_that_broke_other_engines_are_parsed(
    text: str, in_reasoning: bool, reasoning: str, content: str, calls: list[str]
) -> None:
    reply = parse_reply(text, in_reasoning=in_reasoning)
    assert (reply.reasoning, reply.content) == (reasoning, content)
    assert [parsed_call.name for parsed_call in reply.calls] == calls
    assert all(parsed_call.error is None for parsed_call in reply.calls)


# The reply, the name of its call, and a part of the error.
MALFORMED_CALLS = {
    "arguments cut short": (section(call("functions.f:0", '{"a": ')), "f", "the arguments are not JSON: "),
    "arguments that are a list": (section(call("functions.f:0", "[1]")), "f", "the arguments are not a JSON object"),
    "arguments in Python's spelling": (
        section(call("functions.f:0", "{'a': None}")),
        "f",
        "the arguments are not JSON: ",
    ),
    "NaN": (section(call("functions.f:0", '{"a": NaN}')), "f", "the arguments are not JSON: "),
    "half a surrogate pair": (section(call("functions.f:0", '{"a": "\\ud800"}')), "f", "the arguments are not JSON: "),
    "deep arguments": (section(call("functions.f:0", '{"a":' + "[" * 100_000)), "f", "nested more than 100 deep"),
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


@pytest.mark.parametrize(("text", "name", "error"), MALFORMED_CALLS.values(), ids=MALFORMED_CALLS)
def test_the_error_of_a_malformed_call_states_the_format_of_a_call(text: str, name: str, error: str) -> None:
    (parsed_call,) = parse_reply(text).calls
    assert parsed_call.name == name
    assert parsed_call.values is None
    assert parsed_call.error is not None
    assert parsed_call.error.startswith("The call was not run: ")
    assert error in parsed_call.error
    assert "functions.NAME:NUMBER" in parsed_call.error
    assert len(parsed_call.error) < 400
