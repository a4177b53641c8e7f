"""Tests of defects of other servers that broke Claude Code and other clients of the Messages API.

A test has the name of the issue that describes the defect.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mlx_k2.scheduling.request import Priority
from mlx_k2.server.messages_request import MessagesRequest
from mlx_k2.server.request_fields import read_fields
from tests.server.in_process import SteppedServer, stepped_server, stepping, wait_until
from tests.server.messages_client import CLIENT_TOOLS, MESSAGES, USER, client_of, message_of
from tests.server.server_process import Server
from tests.server.test_life_of_a_request import send


@pytest.fixture(scope="module")
def ready_server() -> Iterator[SteppedServer]:
    """A server that answers at once with random tokens."""
    with stepped_server(num_slots=4, chunk_tokens=512) as server, stepping(server):
        yield server


def prompt_text(server: SteppedServer, **fields: Any) -> str:
    """Return the prompt of a request as text."""
    body = {"max_tokens": 5, "messages": USER, "tools": CLIENT_TOOLS} | fields
    model = server.state.model()
    return model.text_of(model.chat_prompt(read_fields(json.dumps(body).encode(), MessagesRequest).chat, "")[0])


def test_claude_code_68900_a_billing_line_that_differs_leaves_the_prompt_cached(ready_server: SteppedServer) -> None:
    client = client_of(ready_server)
    usages = []
    for number in range(2):
        billing = f"x-anthropic-billing-header: cc_version=2.1.36; cch={number:05x}"
        system = [{"type": "text", "text": billing}, {"type": "text", "text": "Be short."}]
        usages.append(message_of(client, system=system, max_tokens=2)["usage"])
    assert usages[1]["input_tokens"] == 1


@pytest.mark.parametrize("thinking", [{"type": "disabled"}, {"type": "adaptive"}, {"type": "new"}, None])
def test_claude_code_69379_thinking_is_never_refused(ready_server: SteppedServer, thinking: Any) -> None:
    fields = {} if thinking is None else {"thinking": thinking}
    assert ready_server.request("POST", MESSAGES, {"max_tokens": 1, "messages": USER} | fields).status == 200


def test_copilot_api_217_server_tools_are_left_out(ready_server: SteppedServer) -> None:
    tools = [*CLIENT_TOOLS, {"type": "web_search_20250305", "name": "web_search"}]
    assert prompt_text(ready_server, tools=tools) == prompt_text(ready_server)
    assert ready_server.request("POST", MESSAGES, {"max_tokens": 1, "messages": USER, "tools": tools}).status == 200


def test_lms_2055_a_count_is_exact(server: Server) -> None:
    client = client_of(server)
    fields: dict[str, Any] = {"model": "m", "system": "Be short.", "messages": USER, "tools": CLIENT_TOOLS}
    usage = client.messages.create(max_tokens=1, **fields).usage
    counted = client.messages.count_tokens(**fields).input_tokens
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_claude_relay_service_731_50_counts_at_once_do_not_wait_for_the_model() -> None:
    with stepped_server(max_queued=1) as server, ThreadPoolExecutor(8) as pool:
        waiting = [send(server, "POST", MESSAGES, {"max_tokens": 5, "messages": USER})]
        wait_until(lambda: bool(server.tokens.plans), "the first request runs")
        waiting.append(send(server, "POST", MESSAGES, {"max_tokens": 5, "messages": USER}))
        wait_until(lambda: server.num_used == 2, "the model is busy, and the queue is full")
        began = time.monotonic()
        path = f"{MESSAGES}/count_tokens?beta=true"
        answers = list(pool.map(lambda _: server.request("POST", path, {"messages": USER}), range(50)))
        assert time.monotonic() - began < 30
        assert {answer.status for answer in answers} == {200}
        for connection in waiting:
            connection.close()


def test_kimi_k2_128_ids_of_any_form_are_written_as_the_model_knows_them(ready_server: SteppedServer) -> None:
    def loop(*ids: str) -> list[Any]:
        messages = list(USER)
        for number, client_id in enumerate(ids):
            call = {"type": "tool_use", "id": client_id, "name": "f", "input": {"n": number}}
            result = {"type": "tool_result", "tool_use_id": client_id, "content": "r"}
            messages += [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
        return messages

    text = prompt_text(ready_server, messages=loop("toolu_01A", "functions_f_0"))
    assert text == prompt_text(ready_server, messages=loop("functions.f:0", "functions.f:1"))
    assert text.count("functions.f:0") == text.count("functions.f:1") == 2


def test_open_webui_28413_a_title_is_a_brief_request_and_an_agents_is_not(ready_server: SteppedServer) -> None:
    model = ready_server.state.model()
    for fields, priority in (
        ({"max_tokens": 512}, Priority.BRIEF),
        ({"max_tokens": 512, "tools": CLIENT_TOOLS}, Priority.INTERACTIVE),
        ({"max_tokens": 32000}, Priority.INTERACTIVE),
    ):
        chat = read_fields(json.dumps({"messages": USER} | fields).encode(), MessagesRequest).chat
        assert model.chat(chat, "").submissions[0].request.priority is priority


def test_exo_the_text_of_a_failed_call_reaches_the_model(ready_server: SteppedServer) -> None:
    call = {"type": "tool_use", "id": "x", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "x", "content": "no such file", "is_error": True}
    messages = [*USER, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    assert "Error: no such file" in prompt_text(ready_server, messages=messages)
