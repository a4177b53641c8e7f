"""Tests of errors that other servers had with Claude Code and other clients of the Messages API.

A test is named after an issue where the error was described, or after the server that had it.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mlx_k2.scheduling.request import Priority
from mlx_k2.server.messages_request import MessagesRequest
from mlx_k2.server.request_fields import read_fields
from tests.server.forced_replies import USER_MESSAGES
from tests.server.in_process import SteppedServer, stepped_server
from tests.server.messages_client import CLIENT_TOOLS, MESSAGES_PATH, client_of, create_message
from tests.server.server_process import Server


def prompt_text(server: SteppedServer, **fields: Any) -> str:
    """Return the prompt of a request as text."""
    body = {"max_tokens": 5, "messages": USER_MESSAGES, "tools": CLIENT_TOOLS} | fields
    chat = read_fields(json.dumps(body).encode(), MessagesRequest).chat
    model = server.state.model()
    prompt_ids, *_ = model.chat_prompt(chat, owner="")
    return model.text_of(prompt_ids)


def test_claude_code_68900_a_billing_line_that_differs_leaves_the_prompt_cached(fast_server: SteppedServer) -> None:
    client = client_of(fast_server)
    usages = []
    for number in range(2):
        billing = f"x-anthropic-billing-header: cc_version=2.1.36; cch={number:05x}"
        system = [{"type": "text", "text": billing}, {"type": "text", "text": "Be short."}]
        usages.append(create_message(client, system=system, max_tokens=2)["usage"])
    assert usages[1]["input_tokens"] == 1, "more than the last position was computed"


@pytest.mark.parametrize("thinking", [{"type": "disabled"}, {"type": "adaptive"}, {"type": "new"}, None])
def test_claude_code_69379_thinking_is_never_refused(fast_server: SteppedServer, thinking: Any) -> None:
    body = {"max_tokens": 1, "messages": USER_MESSAGES} | ({} if thinking is None else {"thinking": thinking})
    assert fast_server.request("POST", MESSAGES_PATH, body).status == 200


def test_copilot_api_217_server_tools_are_left_out(fast_server: SteppedServer) -> None:
    tools = [*CLIENT_TOOLS, {"type": "web_search_20250305", "name": "web_search"}]
    assert prompt_text(fast_server, tools=tools) == prompt_text(fast_server)
    body = {"max_tokens": 1, "messages": USER_MESSAGES, "tools": tools}
    assert fast_server.request("POST", MESSAGES_PATH, body).status == 200


def test_lms_2055_a_count_is_exact(server: Server) -> None:
    client = client_of(server)
    fields: dict[str, Any] = {"model": "m", "system": "Be short.", "messages": USER_MESSAGES, "tools": CLIENT_TOOLS}
    usage = client.messages.create(max_tokens=1, **fields).usage
    counted = client.messages.count_tokens(**fields).input_tokens
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_claude_relay_service_731_50_counts_at_once_do_not_wait_for_the_model() -> None:
    with stepped_server(max_queued=1) as server, ThreadPoolExecutor(50) as pool:
        body = {"max_tokens": 5, "messages": USER_MESSAGES}
        running = server.send("POST", MESSAGES_PATH, body)
        server.wait_for_plan()
        queued = server.send("POST", MESSAGES_PATH, body)
        server.wait_for_requests(2)
        started_at = time.monotonic()
        path = f"{MESSAGES_PATH}/count_tokens?beta=true"
        answers = list(pool.map(lambda _: server.request("POST", path, {"messages": USER_MESSAGES}), range(50)))
        assert time.monotonic() - started_at < 30
        assert {answer.status for answer in answers} == {200}
        running.close()
        queued.close()


def test_kimi_k2_128_ids_of_any_form_have_the_models_form_in_the_prompt(fast_server: SteppedServer) -> None:
    def history(*ids: str) -> list[Any]:
        messages = list(USER_MESSAGES)
        for number, call_id in enumerate(ids):
            call = {"type": "tool_use", "id": call_id, "name": "f", "input": {"n": number}}
            result = {"type": "tool_result", "tool_use_id": call_id, "content": "r"}
            messages += [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
        return messages

    text = prompt_text(fast_server, messages=history("toolu_01A", "functions_f_0"))
    assert text == prompt_text(fast_server, messages=history("functions.f:0", "functions.f:1"))
    assert text.count("functions.f:0") == text.count("functions.f:1") == 2, "not in each call and in its result"


def test_open_webui_28413_a_request_for_a_title_is_brief_and_an_agents_is_not(fast_server: SteppedServer) -> None:
    model = fast_server.state.model()
    for fields, priority in (
        ({"max_tokens": 512}, Priority.BRIEF),
        ({"max_tokens": 512, "tools": CLIENT_TOOLS}, Priority.INTERACTIVE),
        ({"max_tokens": 32000}, Priority.INTERACTIVE),
    ):
        chat = read_fields(json.dumps({"messages": USER_MESSAGES} | fields).encode(), MessagesRequest).chat
        assert model.chat(chat, owner="").submissions[0].request.priority is priority


def test_exo_the_prompt_shows_that_a_tool_failed(fast_server: SteppedServer) -> None:
    call = {"type": "tool_use", "id": "x", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "x", "content": "no such file", "is_error": True}
    messages = [*USER_MESSAGES, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    assert "Error: no such file" in prompt_text(fast_server, messages=messages)
