"""Tests of requests of the Messages API: the chat request that each becomes, and refusals."""

import json
from typing import Any

import pytest

from mlx_k2.server.api_errors import ApiError
from mlx_k2.server.chat_request import ChatRequest
from mlx_k2.server.messages_request import MessagesRequest
from mlx_k2.server.request_fields import read_fields

USER_MESSAGE = {"role": "user", "content": "a"}
BILLING_LINE = "x-anthropic-billing-header: cc_version=2.1.36; cch=a1b2c;"


def chat_request(**fields: Any) -> ChatRequest:
    body = {"max_tokens": 5, "messages": [USER_MESSAGE]} | fields
    return read_fields(json.dumps(body).encode(), MessagesRequest).chat


def text_blocks(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("system", "content"),
    [
        (None, None),
        ("", None),
        ("Be short.", "Be short."),
        (text_blocks("Be", "short."), "Be\n\nshort."),
        (text_blocks(BILLING_LINE, "Be short."), "Be short."),
        (f"{BILLING_LINE}\nBe short.", "Be short."),
        (text_blocks(BILLING_LINE), None),
        (text_blocks("Be short.", BILLING_LINE), f"Be short.\n\n{BILLING_LINE}"),
        (f"Be short.\n{BILLING_LINE}", f"Be short.\n{BILLING_LINE}"),
    ],
)
def test_the_billing_line_is_dropped_at_the_start_of_system_only(system: Any, content: str | None) -> None:
    *system_messages, last = chat_request(system=system, messages=[{"role": "user", "content": BILLING_LINE}]).messages
    assert last == {"role": "user", "content": BILLING_LINE}
    assert system_messages == ([] if content is None else [{"role": "system", "content": content}])


def test_consecutive_turns_of_the_user_become_one_message() -> None:
    turns = [USER_MESSAGE, {"role": "user", "content": text_blocks("b", "c")}]
    assert chat_request(messages=turns).messages == [{"role": "user", "content": "a\nb\nc"}]


CALL = {"type": "tool_use", "id": "x", "name": "f", "input": {"a": 1}}
CALLING_MESSAGE = {
    "role": "assistant",
    "content": "I call.",
    "reasoning_content": "hm",
    "turn_handle": "handle",
    "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
}


def test_consecutive_turns_of_the_assistant_become_one_message() -> None:
    thinking = {"type": "thinking", "thinking": "hm", "signature": "handle"}
    turns = [
        USER_MESSAGE,
        {"role": "assistant", "content": [thinking, *text_blocks("I "), {"type": "server_tool_use", "id": "s"}]},
        {"role": "assistant", "content": [*text_blocks("call."), CALL]},
        USER_MESSAGE,
    ]
    assert chat_request(messages=turns).messages[1] == CALLING_MESSAGE


def test_results_come_before_the_users_text() -> None:
    result = {"type": "tool_result", "tool_use_id": "x"}
    blocks = [
        *text_blocks("r", "s"),
        {"type": "image", "source": {}},
        {"type": "tool_reference", "tool_name": "g"},
        {"type": "new"},
    ]
    turns = [
        USER_MESSAGE,
        {"role": "assistant", "content": [CALL]},
        {"role": "user", "content": [*text_blocks("d"), {**result, "content": "gone", "is_error": True}]},
        {"role": "user", "content": [{**result, "content": blocks}, result]},
    ]
    contents = ("Error: gone", "r\ns\n[image left out: this model reads text only]\ng", "")
    assert chat_request(messages=turns).messages[2:] == [
        *({"role": "tool", "tool_call_id": "x", "content": content} for content in contents),
        {"role": "user", "content": "d"},
    ]


@pytest.mark.parametrize("kind", ["image", "document", "search_result"])
def test_a_block_that_the_model_cannot_read_is_refused_and_named(kind: str) -> None:
    with pytest.raises(ApiError) as caught:
        block = {"type": kind, "source": {"data": "x"}}
        chat_request(messages=[USER_MESSAGE, {"role": "user", "content": [*text_blocks("a"), block]}])
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
    assert chat_request(tools=tools).tools == [
        {"type": "function", "function": {"name": "f", "description": "F.", "parameters": schema, "strict": True}},
        {"type": "function", "function": {"name": "g", "parameters": {}}},
    ]


@pytest.mark.parametrize(
    ("choice", "openai_choice", "parallel_tool_calls"),
    [
        ({"type": "auto"}, "auto", None),
        ({"type": "any"}, "required", None),
        ({"type": "none"}, "none", None),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}, None),
    ],
)
def test_tool_choice_is_translated_to_openais(choice: Any, openai_choice: Any, parallel_tool_calls: Any) -> None:
    request = chat_request(tool_choice=choice, tools=[{"name": "f", "input_schema": {}}])
    assert (request.tool_choice, request.parallel_tool_calls) == (openai_choice, parallel_tool_calls)


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
    request = chat_request(**fields)
    assert (request.wants_thinking, request.thinking_budget) == (thinks, budget)


def test_sampling_and_limits_are_read_and_unknown_fields_ignored_at_every_level() -> None:
    unknown = {"new": {"a": [1]}}
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop_sequences": ["x"], "stream": True}
    ignored = {
        **unknown,
        "metadata": {"user_id": "u"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015"}]},
        "betas": ["b"],
        "service_tier": "auto",
        "container": None,
        "inference_geo": "eu",
        "cache_control": {"type": "ephemeral"},
        "output_config": unknown,
        "thinking": {"type": "adaptive", **unknown},
    }
    block = {"type": "text", "text": "a", "citations": None, **unknown}
    request = chat_request(**sampling, **ignored, messages=[{"role": "user", "content": [block], **unknown}])
    assert (request.temperature, request.top_p, request.top_k) == (0.5, 0.9, 7)
    assert (request.stop_strings, request.stream, request.limit_tokens) == (("x",), True, 5)
    assert request.messages == [USER_MESSAGE]
    assert request.service_tier is None, "it was read as OpenAI's field of this name, which has another meaning"
