"""Test of Claude Code's requests: a loop of calls whose history is sent as text, without reasoning."""

import json
from typing import Any

import hypothesis
import pytest

from tests.server.messages_client import client_of
from tests.server.server_process import Server
from tests.server.test_request_shapes import OTHERS

ROUNDS = 20 if hypothesis.settings.get_current_profile_name() == "long" else 5
CACHED = {"cache_control": {"type": "ephemeral"}}
REQUEST_FIELDS: dict[str, Any] = {
    "model": "claude-sonnet-5",
    "max_tokens": 80,
    "tool_choice": {"type": "tool", "name": "get_weather"},
    "thinking": {"type": "enabled", "budget_tokens": 12},
    "metadata": {"user_id": "user_1_account__session_2"},
    "extra_body": {
        "temperature": 0,
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    },
    "extra_headers": {"anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14"},
    "extra_query": {"beta": "true"},
}
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Lyon"]}}, "required": ["city"]}
TOOLS: list[Any] = [
    *(
        {"name": function["name"], "description": function["description"], "input_schema": function["parameters"]}
        | CACHED
        for function in (tool["function"] for tool in OTHERS)
    ),
    {"name": "get_weather", "description": "Current weather in a city.", "input_schema": CITY},
]


def system_of(number: int) -> list[Any]:
    """Return the system prompt, whose first block differs each time."""
    billing = f"x-anthropic-billing-header: cc_version=2.1.36.{number:03x}; cc_entrypoint=cli; cch={number:05x};"
    return [{"type": "text", "text": text} | CACHED for text in (billing, "You are Claude Code.", "Be short.")]


def without_reasoning(messages: list[Any]) -> list[Any]:
    def kept(content: Any) -> Any:
        return content if isinstance(content, str) else [block for block in content if block["type"] != "thinking"]

    return [{**message, "content": kept(message["content"])} for message in messages]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_loop_of_calls_with_40_tools_is_computed_from_the_cache_and_keeps_its_reasoning(server: Server) -> None:
    """After each result the client asks on within the same turn. The small model is forced to call a tool each time."""
    client = client_of(server)
    complete: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    num_prompt = num_cached = num_thoughts = 0
    for number in range(ROUNDS):
        request: dict[str, Any] = REQUEST_FIELDS | {"system": system_of(number), "tools": TOOLS}
        with client.messages.stream(messages=without_reasoning(complete), **request) as stream:
            message = stream.get_final_message().to_dict()
        usage: Any = message["usage"]
        if number:
            num_prompt += usage["input_tokens"] + usage["cache_read_input_tokens"]
            num_cached += usage["cache_read_input_tokens"]
        content: Any = message["content"]
        assert message["stop_reason"] == "tool_use"
        num_thoughts += content[0]["type"] == "thinking"
        complete.append({"role": "assistant", "content": content})
        text = json.dumps({"city": "Paris", "sky": "sunny", "temperature": number})
        results = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": text}
            for block in content
            if block["type"] == "tool_use"
        ]
        complete.append({"role": "user", "content": results})
    assert len(TOOLS) == 40
    assert num_cached >= 0.95 * num_prompt
    assert num_thoughts == ROUNDS

    def count(messages: list[Any], system: list[Any]) -> int:
        return client.messages.count_tokens(model="m", messages=messages, system=system, tools=TOOLS).input_tokens

    assert count(without_reasoning(complete), system_of(99)) == count(complete, system_of(98))
    changed = [{"type": "text", "text": "Another prompt."}]
    assert count(without_reasoning(complete), changed) < count(complete, changed)
