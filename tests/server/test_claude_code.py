"""Test of Claude Code's requests: a loop of calls whose history has no reasoning."""

import json
from typing import Any

import hypothesis
import pytest

from tests.server.chat_client import MCP_TOOLS
from tests.server.messages_client import client_of
from tests.server.server_process import Server

NUM_ROUNDS = 20 if hypothesis.settings.get_current_profile_name() == "long" else 5
CACHE_CONTROL = {"cache_control": {"type": "ephemeral"}}
REQUEST: dict[str, Any] = {
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
    {"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]} | CACHE_CONTROL
    for tool in (tool["function"] for tool in MCP_TOOLS)
]
TOOLS.append({"name": "get_weather", "description": "Current weather in a city.", "input_schema": CITY})


def system_prompt(number: int) -> list[Any]:
    """Return the system prompt, whose first block differs for each number."""
    billing = f"x-anthropic-billing-header: cc_version=2.1.36.{number:03x}; cc_entrypoint=cli; cch={number:05x};"
    return [{"type": "text", "text": text} | CACHE_CONTROL for text in (billing, "You are Claude Code.", "Be short.")]


def without_reasoning(messages: list[Any]) -> list[Any]:
    """Return the messages without thinking blocks. Contents are lists of blocks."""
    return [
        {**message, "content": [block for block in message["content"] if block["type"] != "thinking"]}
        for message in messages
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_loop_of_calls_with_40_tools_is_computed_from_the_cache_and_keeps_its_reasoning(server: Server) -> None:
    """After each result the client continues the same turn. The small model is forced to call a tool each time."""
    client = client_of(server)
    question = [{"type": "text", "text": "What is the weather in Paris?"}]
    history: list[Any] = [{"role": "user", "content": question}]
    prompt_tokens = cached_tokens = 0
    for number in range(NUM_ROUNDS):
        request: dict[str, Any] = REQUEST | {"system": system_prompt(number), "tools": TOOLS}
        with client.messages.stream(messages=without_reasoning(history), **request) as stream:
            message: Any = stream.get_final_message().to_dict()
        if number:
            usage = message["usage"]
            prompt_tokens += usage["input_tokens"] + usage["cache_read_input_tokens"]
            cached_tokens += usage["cache_read_input_tokens"]
        assert message["stop_reason"] == "tool_use"
        assert message["content"][0]["type"] == "thinking"
        text = json.dumps({"city": "Paris", "sky": "sunny", "temperature": number})
        results = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": text}
            for block in message["content"]
            if block["type"] == "tool_use"
        ]
        history += [{"role": "assistant", "content": message["content"]}, {"role": "user", "content": results}]
    assert len(TOOLS) == 40
    assert cached_tokens >= 0.95 * prompt_tokens

    def num_prompt_tokens(messages: list[Any], system: list[Any]) -> int:
        return client.messages.count_tokens(model="m", messages=messages, system=system, tools=TOOLS).input_tokens

    num_expected = num_prompt_tokens(history, system_prompt(98))
    assert num_prompt_tokens(without_reasoning(history), system_prompt(99)) == num_expected, "the reasoning is lost"
    changed_system = [{"type": "text", "text": "Another prompt."}]
    assert num_prompt_tokens(without_reasoning(history), changed_system) < num_prompt_tokens(history, changed_system)
