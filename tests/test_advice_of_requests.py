"""Tests of the advice in refusals of requests to the server: a request that follows it is accepted."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from mlx_k2.server.api_errors import ApiError
from mlx_k2.server.chat_request import read_chat_request, read_completion_request
from mlx_k2.server.messages_request import MessagesRequest
from mlx_k2.server.request_fields import read_fields
from mlx_k2.server.responses_request import conversation_of, read_responses_request

pytestmark = pytest.mark.timeout(60)
USER = {"role": "user", "content": "a"}
FUNCTION = {"type": "function", "name": "f"}
Rows = tuple[tuple[str, dict[str, Any], dict[str, Any]], ...]
"""Rows of a message with advice, fields of a request that it refuses, and fields that follow the advice."""

CHATS: Rows = (
    (
        "give text, json_object, or json_schema with json_schema.schema",
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_object"}},
    ),
    *(
        (
            "response_format: give true or false for strict",
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "object"}, "strict": "yes"},
                }
            },
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "object"}, "strict": value},
                }
            },
        )
        for value in (True, False)
    ),
    (
        "functions is deprecated: use tools and tool_choice",
        {"functions": [{}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"},
    ),
    ("top_logprobs: give 0 to 20", {"logprobs": True, "top_logprobs": 21}, {"logprobs": True, "top_logprobs": 20}),
    (
        "reasoning_effort 'much' is unknown: give one of none,",
        {"reasoning_effort": "much"},
        {"reasoning_effort": "none"},
    ),
    (
        "513 tools are declared: give at most 512",
        {"tools": [{"function": {"name": f"f{n}"}} for n in range(513)]},
        {"tools": [{"function": {"name": f"f{n}"}} for n in range(512)]},
    ),
    (
        "tools of type 'x' are not supported: give functions",
        {"tools": [{"type": "x", "function": {"name": "f"}}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
    ),
    ("n is 0: give 1 to ", {"n": 0}, {"n": 1}),
    ("min_tokens: give at least 0", {"min_tokens": -1}, {"min_tokens": 0}),
    ("max_tokens is 0: give at least 1", {"max_tokens": 0}, {"max_tokens": 1}),
    ("stop: give at most 16 strings", {"stop": ["a"] * 17}, {"stop": ["a"] * 16}),
)
COMPLETIONS: Rows = (
    ("prompt: give one text, or the token ids of one", {"prompt": ["a", "b"]}, {"prompt": [3, 4]}),
    ("suffix is not supported: leave it out", {"suffix": "a"}, {}),
    ("this server returns every choice: leave best_of out", {"best_of": 2}, {}),
)


MESSAGES: Rows = (
    (
        "messages[0].role is 'tool': give user or assistant",
        {"messages": [{"role": "tool", "content": "a"}]},
        {"messages": [USER, {"role": "assistant", "content": "b"}, USER]},
    ),
    (
        "the last message is the assistant's: this server does not continue an answer, so end with a user's",
        {"messages": [USER, {"role": "assistant", "content": "b"}]},
        {"messages": [USER, {"role": "assistant", "content": "b"}, USER]},
    ),
    (
        "output_config.format: give the type json_schema, and a schema",
        {"output_config": {"format": {"type": "json_schema"}}},
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
    ),
    ("max_tokens is -1: give at least 0", {"max_tokens": -1}, {"max_tokens": 0}),
    *(
        (
            "tool_choice.type is 'x': give auto, any, tool or none",
            {"tools": [{"name": "f"}], "tool_choice": {"type": "x"}},
            {"tools": [{"name": "f"}], "tool_choice": {"type": kind, "name": "f"}},
        )
        for kind in ("auto", "any", "tool", "none")
    ),
)
RESPONSES: Rows = (
    (
        "conversations are not stored: use previous_response_id",
        {"conversation": "conv_1"},
        {"previous_response_id": "resp_1"},
    ),
    (
        "tool_choice 'web_search' cannot be used: name a function",
        {"tools": [FUNCTION], "tool_choice": {"type": "web_search"}},
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "f"}},
    ),
    ("a response in the background is not supported: leave it out", {"background": True}, {}),
    (
        "prompt templates are not stored: send their text as instructions",
        {"prompt": {"id": "pmpt_1"}},
        {"instructions": "Be brief."},
    ),
    ("a response is one answer: leave n out", {"n": 2}, {}),
)


def read_chat(fields: dict[str, Any]) -> bool:
    """Read a chat request; return whether its answers are free or JSON objects, as in every row of CHATS."""
    chat = read_chat_request(json.dumps({"messages": [USER]} | fields).encode())
    return chat.answer_format is None or chat.answer_format.schema == {"type": "object"}


def read_completion(fields: dict[str, Any]) -> bool:
    """Read a completion request; return whether it has a prompt."""
    return bool(read_completion_request(json.dumps({"prompt": "Hello"} | fields).encode()).text_or_ids)


def read_messages(fields: dict[str, Any]) -> bool:
    """Read a request of Anthropic's API; return whether the user's message is its last, as in every row of MESSAGES."""
    request = read_fields(json.dumps({"max_tokens": 5, "messages": [USER]} | fields).encode(), MessagesRequest)
    return request.chat.messages[-1] == USER


def read_response(fields: dict[str, Any]) -> bool:
    """Read a request for a response; return whether it has the user's message, and no field causes a warning."""
    conversation = conversation_of(read_responses_request(json.dumps({"input": "a"} | fields).encode()))
    return conversation.messages == [USER] and not conversation.warnings


@pytest.mark.parametrize(
    ("read", "message", "wrong", "right"),
    [
        *((read_chat, *row) for row in CHATS),
        *((read_completion, *row) for row in COMPLETIONS),
        *((read_messages, *row) for row in MESSAGES),
        *((read_response, *row) for row in RESPONSES),
    ],
)
def test_a_request_that_follows_the_advice_of_its_refusal_is_accepted(
    read: Callable[[dict[str, Any]], bool], message: str, wrong: dict[str, Any], right: dict[str, Any]
) -> None:
    with pytest.raises(ApiError, match=re.escape(message)):
        read(wrong)
    assert read(right)
