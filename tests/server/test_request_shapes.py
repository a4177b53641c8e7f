"""Tests of requests as agents send them: 40 tools, unknown fields, and a loop of calls."""

import json
from typing import Any

import hypothesis
import pytest

from tests.server.chat_client import MCP_TOOLS, WEATHER_QUESTION, WEATHER_TOOLS
from tests.server.http_client import CHAT_PATH
from tests.server.server_process import Server

MAX_ROUNDS = 20 if hypothesis.settings.get_current_profile_name() == "long" else 5
# for kimi-cli only two, which show that the second one comes from the cache
NUM_ROUNDS = {"opencode": MAX_ROUNDS, "cline": MAX_ROUNDS, "kimi-cli": 2}
REQUESTS: dict[str, dict[str, Any]] = {
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


def join_chunks(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the message that a client builds from the chunks of a stream."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        message["content"] += choice["delta"].get("content", "")
        for part in choice["delta"].get("tool_calls", ()):
            if "id" in part:
                message["tool_calls"].append({name: part[name] for name in ("id", "type", "function")})
            else:
                message["tool_calls"][-1]["function"]["arguments"] += part["function"]["arguments"]
    return message


@pytest.mark.slow
@pytest.mark.parametrize("client", REQUESTS)
def test_a_loop_of_calls_with_40_tools_is_computed_from_the_cache(server: Server, client: str) -> None:
    """After each result the client sends the next request within the same turn, as an agent does."""
    messages: list[Any] = [{"role": "system", "content": "You are a coding agent."}, *WEATHER_QUESTION]
    tools = [*MCP_TOOLS, *WEATHER_TOOLS]
    prompt_tokens = cached_tokens = 0
    for number in range(NUM_ROUNDS[client]):
        request = {**REQUESTS[client], "messages": messages, "tools": tools, "seed": number}
        answer = server.request("POST", CHAT_PATH, request)
        assert answer.status == 200, answer.body
        if number:
            usage = answer.events[-1]["usage"]
            prompt_tokens += usage["prompt_tokens"]
            cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
        message = join_chunks(answer.events)
        if not message["tool_calls"]:  # the small model may answer instead: then its turn is replaced by a call
            function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
            calls = [{"id": f"call_{number}", "type": "function", "function": function}]
            message = {"role": "assistant", "content": None, "tool_calls": calls}
        messages.append(message)
        result = json.dumps({"city": "Paris", "sky": "sunny", "temperature": number})
        messages += [{"role": "tool", "tool_call_id": call["id"], "content": result} for call in message["tool_calls"]]
    assert cached_tokens >= 0.95 * prompt_tokens
