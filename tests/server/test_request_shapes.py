"""Tests of requests as agents send them: many tools, own ids, unknown fields, and a loop of calls."""

import json
from typing import Any

import hypothesis
import pytest

from tests.server.server_process import Server
from tests.server.test_chat_completions import WEATHER

OTHERS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": f"mcp__server-{number}.tool",
            "description": f"Tool number {number}.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "limit": {"type": ["integer", "null"], "default": number}},
                "required": ["path"],
                "additionalProperties": False,
            },
            "strict": False,
        },
    }
    for number in range(39)
]
MANY = 20 if hypothesis.settings.get_current_profile_name() == "long" else 5
ROUNDS = {"opencode": MANY, "cline": MANY, "kimi-cli": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "opencode": {
        "model": "kimi-k2-tiny",
        "max_tokens": 12,
        "temperature": 0,
        "top_p": 1,
        "tool_choice": "auto",
        "stream": True,
        "stream_options": {"include_usage": True},
        "reasoning_effort": "high",
        "user": "session-1",
    },
    "cline": {
        "model": "anything",
        "temperature": 0,
        "max_completion_tokens": 12,
        "stream": True,
        "stream_options": {"include_usage": True},
        "parallel_tool_calls": False,
        "metadata": {"task": "1"},
        "store": False,
    },
    "kimi-cli": {
        "model": "kimi-for-coding",
        "temperature": 0,
        "max_tokens": 12,
        "stream": True,
        "stream_options": {"include_usage": True},
        "prompt_cache_key": "abc",
        "thinking": {"type": "enabled", "keep": "all"},
    },
}


def last_usage_and_message(server: Server, request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Send a streamed request; return its usage and the message that a client builds of the chunks."""
    answer = server.request("POST", "/v1/chat/completions", request)
    assert answer.status == 200, answer.body
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    usage: dict[str, Any] = {}
    for line in answer.body.split(b"\n"):
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            message["content"] += choice["delta"].get("content", "")
            for part in choice["delta"].get("tool_calls", ()):
                if "id" in part:
                    message["tool_calls"].append({name: part[name] for name in ("id", "type", "function")})
                else:
                    message["tool_calls"][-1]["function"]["arguments"] += part["function"]["arguments"]
    return usage, message


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_loop_of_calls_with_40_tools_is_computed_from_the_cache(server: Server, name: str) -> None:
    """After each result the client asks on within the same turn, as an agent that works through a list."""
    messages: list[Any] = [
        {"role": "system", "content": "You are a coding agent."},
        {"role": "user", "content": "What is the weather in Paris?"},
    ]
    tools = [*OTHERS, *WEATHER]
    prompt_tokens = cached_tokens = num_calls = 0
    for number in range(ROUNDS[name]):
        request = {**SHAPES[name], "messages": messages, "tools": tools, "seed": number}
        usage, message = last_usage_and_message(server, request)
        if number:
            prompt_tokens += usage["prompt_tokens"]
            cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
        if not message["tool_calls"]:  # the small model answers: it is told of one more call instead
            function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
            calls = [{"id": f"call_{number}", "type": "function", "function": function}]
            message = {"role": "assistant", "content": None, "tool_calls": calls}
        messages.append(message)
        for call in message["tool_calls"]:
            num_calls += 1
            result = json.dumps({"city": "Paris", "sky": "sunny", "temperature": number})
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    assert num_calls >= ROUNDS[name]
    assert cached_tokens >= 0.95 * prompt_tokens
