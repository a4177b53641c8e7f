"""Tests of responses over HTTP: replies of every kind, stored responses, keep-alives of a stream, and failures."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI

from mlx_k2.server.api_keys import KeyRing, add_key
from mlx_k2.server.server_state import ServerOptions
from tests.server.forced_replies import CALLS_REPLY, TOOLS, USER_MESSAGES, ForcedServer, forced_server, prompt_ids
from tests.server.http_client import WAIT_S, parse_answer, receive_until
from tests.server.in_process import SteppedServer, stepped_server
from tests.server.responses_events import (
    FUNCTIONS,
    RESPONSES_PATH,
    Fields,
    check_events,
    comparable_fields,
    parse_events,
)
from tests.server.test_official_clients import CASES

REQUEST: Fields = {"model": "m", "input": "a", "tools": FUNCTIONS}
RESULTS: list[Any] = [
    {"type": "function_call_output", "call_id": "functions.f:0", "output": "1"},
    {"type": "function_call_output", "call_id": "functions.mcp__a-b.c:1", "output": "2"},
]
"""The results of the calls in CALLS_REPLY."""


@pytest.fixture(scope="module")
def calling_server() -> Iterator[ForcedServer]:
    """A server whose model thinks, writes a text and calls two tools."""
    with forced_server(CALLS_REPLY) as server:
        yield server


def stream_response(server: SteppedServer, **fields: Any) -> Fields:
    """Return the last response of a stream whose events are checked."""
    answer = server.request("POST", RESPONSES_PATH, REQUEST | {"stream": True} | fields)
    assert answer.status == 200, answer.body
    return check_events(parse_events(answer.body))


def create_response(server: SteppedServer, **fields: Any) -> Fields:
    answer = server.request("POST", RESPONSES_PATH, REQUEST | fields)
    assert answer.status == 200, answer.body
    response: Fields = answer.json
    return response


def send_streamed(server: SteppedServer, **fields: Any) -> socket.socket:
    """Send a streamed request and return its connection."""
    return server.send("POST", RESPONSES_PATH, REQUEST | {"stream": True} | fields)


@pytest.mark.parametrize("name", CASES)
def test_the_stream_is_the_body_for_every_kind_of_reply(name: str) -> None:
    reply, fields = CASES[name]
    fields = {"max_output_tokens": 6} if name == "length" else fields  # CASES has the fields of chat completions
    with forced_server(reply.text) as server:
        body = create_response(server, **fields)
        assert comparable_fields(stream_response(server, **fields)) == comparable_fields(body)
    assert body["status"] == ("incomplete" if reply.finish_reason == "length" else "completed")
    kinds = [item["type"] for item in body["output"]]
    assert ("function_call" in kinds) == (reply.finish_reason == "tool_calls")


def test_a_restart_in_the_middle_changes_nothing() -> None:
    with forced_server(CALLS_REPLY) as server:
        body = create_response(server)
        server.fail_once(index=20, restarts=True)
        assert comparable_fields(stream_response(server)) == comparable_fields(body)
        assert len(server.harness.restarts) == 1


def test_a_failure_in_the_middle_of_a_stream_is_an_event() -> None:
    with forced_server(CALLS_REPLY) as server:
        server.fail_once(index=20, restarts=False)
        response = stream_response(server)
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert "<|" not in json.dumps(response)


def test_a_failure_before_a_body_is_sent_is_a_503() -> None:
    with forced_server(CALLS_REPLY) as server:
        server.fail_once(index=20, restarts=False)
        with pytest.raises(APIStatusError) as caught:
            server.client.responses.create(**REQUEST)
    assert (caught.value.status_code, caught.value.code) == (503, "unavailable")


def test_the_first_events_come_before_the_prompt_is_computed_and_in_progress_is_repeated() -> None:
    options = ServerOptions(keepalive_s=0.05)
    with stepped_server(options) as server, send_streamed(server, max_output_tokens=3) as connection:
        received_bytes = receive_until(connection, b"event: response.in_progress", count=3)
        assert b"event: response.created" in received_bytes.partition(b"response.in_progress")[0]
        with server.running_stages():
            answer = parse_answer(receive_until(connection, b"[DONE]", received_bytes))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert b": keep-alive" not in answer.body


def test_without_keep_alives_in_progress_is_sent_once() -> None:
    options = ServerOptions(keepalive="off", keepalive_s=0.01)
    with stepped_server(options) as server, send_streamed(server, max_output_tokens=3) as connection:
        received_bytes = receive_until(connection, b"event: response.in_progress")
        server.wait_for_plan()
        server.run_plans(2)
        with server.running_stages():
            answer = parse_answer(receive_until(connection, b"[DONE]", received_bytes))
    assert answer.body.count(b"event: response.in_progress") == 1


def test_a_client_that_hangs_up_ends_its_request() -> None:
    with stepped_server() as server:
        connection = send_streamed(server)
        server.wait_for_plan()
        connection.close()
        server.wait_for_requests(0)


def test_a_request_is_cancelled_by_the_id_of_its_response() -> None:
    with stepped_server() as server, send_streamed(server) as connection:
        created = parse_answer(receive_until(connection, b"event: response.in_progress")).events[0]
        response_id = created["response"]["id"]
        assert server.request("POST", f"/v1/requests/{response_id}/cancel").json["cancelled"]
        with server.running_stages():
            assert b"response.completed" in receive_until(connection, b"[DONE]")


def test_a_prompt_that_does_not_fit_is_a_status_or_a_failed_response(calling_server: ForcedServer) -> None:
    client = calling_server.client
    long = "a b c d " * 4000
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(**REQUEST | {"input": long})
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    events: list[Any] = list(client.responses.create(**REQUEST | {"input": long}, stream=True))
    assert [event.type for event in events] == ["response.created", "response.failed"]
    error = events[-1].response.error
    assert error.code == "context_length_exceeded"
    assert "maximum context length" in error.message


def test_a_warning_names_the_types_of_tools_that_are_left_out(calling_server: ForcedServer) -> None:
    tools = [*FUNCTIONS, {"type": "web_search"}]
    answer = calling_server.request("POST", RESPONSES_PATH, REQUEST | {"tools": tools})
    assert '299 mlx-k2 "tools of these types are left out: web_search"' in answer.headers["warning"]


def test_parallel_tool_calls_false_ends_the_response_after_one_call(calling_server: ForcedServer) -> None:
    body = create_response(calling_server, parallel_tool_calls=False)
    assert [item["call_id"] for item in body["output"] if item["type"] == "function_call"] == ["functions.f:0"]
    streamed_response = stream_response(calling_server, parallel_tool_calls=False)
    assert comparable_fields(streamed_response) == comparable_fields(body)


# ---- the store


def num_prompt_tokens(client: OpenAI, items: list[Any] | str, **fields: Any) -> int:
    """Return the number of tokens in the prompt for input items."""
    usage = client.responses.create(**REQUEST | {"input": items, "max_output_tokens": 1} | fields).usage
    assert usage is not None
    return int(usage.input_tokens)


def test_a_stored_response_is_read_again_and_deleted(calling_server: ForcedServer) -> None:
    responses = calling_server.client.responses
    response = responses.create(**REQUEST)
    assert responses.retrieve(response.id).to_dict() == response.to_dict()
    responses.delete(response.id)
    for method in (responses.retrieve, responses.delete):
        with pytest.raises(NotFoundError):
            method(response.id)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_response_continues_the_previous_one(calling_server: ForcedServer, is_streamed: bool) -> None:
    """The prompt is the one of the whole conversation, and the cache has the model's turn with its reasoning."""
    client = calling_server.client
    first = stream_response(calling_server) if is_streamed else create_response(calling_server)
    request = REQUEST | {"input": RESULTS, "max_output_tokens": 1}
    second = client.responses.create(**request, previous_response_id=first["id"])
    assert second.usage is not None
    conversation = [*USER_MESSAGES, *first["output"], *RESULTS]
    assert second.usage.input_tokens == num_prompt_tokens(client, conversation)
    num_first_tokens = first["usage"]["input_tokens"] + first["usage"]["output_tokens"]
    assert second.usage.input_tokens_details.cached_tokens >= num_first_tokens - 1
    assert num_prompt_tokens(client, "b", previous_response_id=second.id) > second.usage.input_tokens


def test_a_response_that_is_not_stored_is_not_found(calling_server: ForcedServer) -> None:
    client = calling_server.client
    response = client.responses.create(**REQUEST, store=False)
    with pytest.raises(NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(**REQUEST, previous_response_id=response.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


def test_the_next_response_has_the_turn_without_the_instructions_of_the_first(calling_server: ForcedServer) -> None:
    client = calling_server.client
    first = client.responses.create(**REQUEST, instructions="Instructions of the first response.")
    calls = [
        {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
        for item in first.output
        if item.type == "function_call"
    ]
    turn = {"role": "assistant", "content": "I call.", "reasoning_content": "Think first.", "tool_calls": calls}
    results = [{"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]} for item in RESULTS]
    expected = prompt_ids(calling_server, messages=[*USER_MESSAGES, turn, *results], tools=TOOLS)
    assert num_prompt_tokens(client, RESULTS, previous_response_id=first.id) == len(expected)


@pytest.mark.parametrize("lost", ["the text", "the handle", "the reasoning"])
def test_lost_reasoning_is_put_back(calling_server: ForcedServer, lost: str) -> None:
    """A client may send the reasoning as text, the handle alone, or nothing."""
    client = calling_server.client
    reasoning, *other_items = [item.to_dict() for item in client.responses.create(**REQUEST, store=False).output]
    sent_reasoning: dict[str, list[Any]] = {
        "the text": [reasoning | {"content": None}],
        "the handle": [reasoning | {"encrypted_content": None}],
        "the reasoning": [],
    }
    complete = [*USER_MESSAGES, reasoning, *other_items, *RESULTS]
    incomplete = [*USER_MESSAGES, *sent_reasoning[lost], *other_items, *RESULTS]
    assert num_prompt_tokens(client, incomplete, store=False) == num_prompt_tokens(client, complete, store=False)


def test_two_keys_never_see_each_others_responses_and_handles(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    alice_key, bob_key = add_key(path, "alice"), add_key(path, "bob")
    with forced_server(CALLS_REPLY, keys=KeyRing(path, is_required=True), key=alice_key) as server:
        alice = server.client
        bob = OpenAI(base_url=f"{server.url}/v1", api_key=bob_key, max_retries=0, timeout=WAIT_S)
        response = alice.responses.create(**REQUEST)
        for method in (bob.responses.retrieve, bob.responses.delete):
            with pytest.raises(NotFoundError):
                method(response.id)
        with pytest.raises(BadRequestError):
            bob.responses.create(**REQUEST, previous_response_id=response.id)
        reasoning, *other_items = [item.to_dict() for item in response.output]
        assert reasoning["encrypted_content"]
        handle = reasoning | {"content": None}
        changed_question = [{"role": "user", "content": "b"}]  # so that only the handle finds the turn
        with_handle = [*changed_question, handle, *other_items, *RESULTS]
        without_handle = [*changed_question, *other_items, *RESULTS]
        num_without = num_prompt_tokens(alice, without_handle)
        assert num_prompt_tokens(alice, with_handle) > num_without
        assert num_prompt_tokens(bob, with_handle) == num_prompt_tokens(bob, without_handle) == num_without
        assert alice.responses.retrieve(response.id).id == response.id
