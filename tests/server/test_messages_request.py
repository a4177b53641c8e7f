"""Tests of requests of the Messages API as chat requests: which field becomes which."""

import json
from typing import Any

import pytest

from mlx_k2.server.api_errors import ApiError
from mlx_k2.server.chat_request import ChatRequest
from mlx_k2.server.messages_request import MessagesRequest
from mlx_k2.server.request_fields import read_fields

USER = {"role": "user", "content": "a"}
BILLING = "x-anthropic-billing-header: cc_version=2.1.36; cch=a1b2c;"


def read(**fields: Any) -> ChatRequest:
    return read_fields(json.dumps({"max_tokens": 5, "messages": [USER]} | fields).encode(), MessagesRequest).chat


def text(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in texts]


@pytest.mark.parametrize(
    ("system", "read_as"),
    [
        (None, None),
        ("", None),
        ("Be short.", "Be short."),
        (text("Be", "short."), "Be\n\nshort."),
        (text(BILLING, "Be short."), "Be short."),
        (f"{BILLING}\nBe short.", "Be short."),
        (text(BILLING), None),
        (text("Be short.", BILLING), f"Be short.\n\n{BILLING}"),
        (f"Be short.\n{BILLING}", f"Be short.\n{BILLING}"),
    ],
)
def test_the_billing_line_is_dropped_at_the_start_of_system_only(system: Any, read_as: str | None) -> None:
    messages = read(system=system, messages=[{"role": "user", "content": BILLING}]).messages
    assert messages[-1] == {"role": "user", "content": BILLING}
    assert messages[:-1] == ([] if read_as is None else [{"role": "system", "content": read_as}])


def test_results_come_before_the_text_and_turns_of_one_role_are_one() -> None:
    call = {"type": "tool_use", "id": "x", "name": "f", "input": {"a": 1}}
    thinking_block = {"type": "thinking", "thinking": "hm", "signature": "handle"}
    result = {"type": "tool_result", "tool_use_id": "x"}
    parts = [
        *text("r", "s"),
        {"type": "image", "source": {}},
        {"type": "tool_reference", "tool_name": "g"},
        {"type": "new"},
    ]
    messages = read(
        messages=[
            USER,
            {"role": "user", "content": text("b", "c")},
            {"role": "assistant", "content": [thinking_block, *text("I "), {"type": "server_tool_use", "id": "s"}]},
            {"role": "assistant", "content": [*text("call."), call]},
            {"role": "user", "content": [*text("d"), {**result, "content": "gone", "is_error": True}]},
            {"role": "user", "content": [{**result, "content": parts}, result]},
        ]
    ).messages
    function = {"name": "f", "arguments": {"a": 1}}
    results = ("Error: gone", "r\ns\n[image left out: this model reads text only]\ng", "")
    assert messages == [
        {"role": "user", "content": "a\nb\nc"},
        {
            "role": "assistant",
            "content": "I call.",
            "reasoning_content": "hm",
            "turn_handle": "handle",
            "tool_calls": [{"id": "x", "type": "function", "function": function}],
        },
        *({"role": "tool", "tool_call_id": "x", "content": content} for content in results),
        {"role": "user", "content": "d"},
    ]


@pytest.mark.parametrize("kind", ["image", "document", "search_result"])
def test_a_block_that_the_model_cannot_read_is_refused_and_named(kind: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(messages=[USER, {"role": "user", "content": [*text("a"), {"type": kind, "source": {"data": "x"}}]}])
    assert (caught.value.param, caught.value.code) == ("messages[1].content[1]", "unsupported_content")
    assert f"is {kind!r}, and this model reads text only" in caught.value.message


def test_tools_of_the_client_are_functions_and_others_are_left_out() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    tools = [
        {"name": "f", "description": "F.", "input_schema": schema, "strict": True, "cache_control": {"type": "x"}},
        {"type": "custom", "name": "g", "input_schema": {}, "defer_loading": True, "allowed_callers": ["direct"]},
        {"type": "web_search_20260101", "name": "web_search", "max_uses": 3},
        {"type": "bash_20250124", "name": "bash"},
    ]
    assert read(tools=tools).tools == [
        {"type": "function", "function": {"name": "f", "description": "F.", "parameters": schema, "strict": True}},
        {"type": "function", "function": {"name": "g", "parameters": {}}},
    ]


@pytest.mark.parametrize(
    ("choice", "read_as"),
    [
        ({"type": "auto"}, ("auto", None)),
        ({"type": "any"}, ("required", None)),
        ({"type": "none"}, ("none", None)),
        ({"type": "auto", "disable_parallel_tool_use": True}, ("auto", False)),
        ({"type": "tool", "name": "f"}, ({"type": "function", "function": {"name": "f"}}, None)),
    ],
)
def test_tool_choice_becomes_that_of_chat_completions(choice: Any, read_as: Any) -> None:
    chat = read(tool_choice=choice, tools=[{"name": "f", "input_schema": {}}])
    assert (chat.tool_choice, chat.parallel_tool_calls) == read_as


@pytest.mark.parametrize(
    ("fields", "thinks", "budget"),
    [
        ({}, None, None),
        ({"thinking": {"type": "adaptive"}}, True, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 4000}}, True, 4000),
        ({"thinking": {"type": "disabled"}}, False, None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, True, 2048),
        ({"output_config": {"effort": "max"}}, True, None),
    ],
)
def test_thinking_and_effort_are_read(fields: dict[str, Any], thinks: bool | None, budget: int | None) -> None:
    chat = read(**fields)
    assert (chat.wants_thinking, chat.thinking_budget) == (thinks, budget)


def test_sampling_and_limits_are_read_and_unknown_fields_ignored_at_every_level() -> None:
    new = {"new": {"a": [1]}}
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop_sequences": ["x"], "stream": True}
    ignored = {
        **new,
        "metadata": {"user_id": "u"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015"}]},
        "betas": ["b"],
        "service_tier": "auto",
        "container": None,
        "inference_geo": "eu",
        "cache_control": {"type": "ephemeral"},
        "output_config": new,
        "thinking": {"type": "adaptive", **new},
    }
    block = {"type": "text", "text": "a", "citations": None, **new}
    chat = read(**sampling, **ignored, messages=[{"role": "user", "content": [block], **new}])
    found = (chat.temperature, chat.top_p, chat.top_k, chat.stop_strings, chat.stream, chat.limit_tokens)
    assert found == (0.5, 0.9, 7, ("x",), True, 5)
    assert chat.messages == [USER]
    assert chat.service_tier is None
