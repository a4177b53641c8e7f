"""Tests of responses over HTTP: replies of every kind, what is stored, what keeps a stream alive, and failures."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI

from mlx_k2.server.api_keys import KeyRing, add_key
from mlx_k2.server.server_state import ServerOptions
from tests.server.forced_replies import REPLIES, TOOLS, USER, ForcedStages, forced_server, prompt_of
from tests.server.in_process import SteppedServer, stepped_server, stepping, wait_until
from tests.server.responses_events import FUNCTIONS, Fields, check_events, events_of, fields_of, without_chunks
from tests.server.server_process import WAIT_S, parse_answer
from tests.server.test_official_clients import ENDS

PATH = "/v1/responses"
REQUEST: Fields = {"model": "m", "input": "a", "tools": FUNCTIONS}
RESULTS: list[Any] = [
    {"type": "function_call_output", "call_id": "functions.f:0", "output": "1"},
    {"type": "function_call_output", "call_id": "functions.mcp__a-b.c:1", "output": "2"},
]
Forced = tuple[SteppedServer, OpenAI, ForcedStages]


@pytest.fixture(scope="module")
def calling_server() -> Iterator[Forced]:
    """A server whose model thinks, writes a text and calls two tools."""
    with forced_server(REPLIES["calls"][0], ServerOptions(strict_model=False)) as forced, stepping(forced[0]):
        yield forced


def stream_response(server: SteppedServer, **fields: Any) -> Fields:
    answer = server.request("POST", PATH, REQUEST | {"stream": True} | fields)
    assert answer.status == 200, answer.body
    return check_events(events_of(without_chunks(answer.body)))


def create_response(server: SteppedServer, **fields: Any) -> Fields:
    answer = server.request("POST", PATH, REQUEST | fields)
    assert answer.status == 200, answer.body
    found: Fields = answer.json
    return found


def open_stream(server: SteppedServer, **fields: Any) -> socket.socket:
    """Send a streamed request and return its connection."""
    body = json.dumps(REQUEST | {"stream": True} | fields).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
    connection.sendall(head.encode() + body)
    return connection


def receive_until(connection: socket.socket, mark: bytes, count: int = 1) -> bytes:
    received = b""
    while received.count(mark) < count:
        part = connection.recv(65536)
        assert part, received
        received += part
    return received


@pytest.mark.parametrize("name", ENDS)
def test_the_stream_is_the_body_for_every_kind_of_reply(name: str) -> None:
    reply, finish_reason = REPLIES.get(name, (REPLIES["text"][0], name))
    fields = {"max_output_tokens": 6} if name == "length" else ENDS[name]
    with forced_server(reply) as (server, _, _), stepping(server):
        body = create_response(server, **fields)
        assert fields_of(stream_response(server, **fields)) == fields_of(body)
    assert body["status"] == ("incomplete" if finish_reason == "length" else "completed")
    kinds = [item["type"] for item in body["output"]]
    assert ("function_call" in kinds) == (finish_reason == "tool_calls")


def test_a_restart_in_the_middle_changes_nothing() -> None:
    with forced_server(REPLIES["calls"][0]) as (server, _, stages), stepping(server):
        body = create_response(server)
        stages.fail_at = 20
        server.tokens.may_restart.set()
        assert fields_of(stream_response(server)) == fields_of(body)
        assert len(server.tokens.restarts) == 1


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_failure_in_the_middle_is_an_event_or_a_status(is_streamed: bool) -> None:
    with forced_server(REPLIES["calls"][0]) as (server, client, stages), stepping(server):
        stages.fail_at = 20
        server.tokens.cancel()
        if is_streamed:
            failed = stream_response(server)
            assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
            assert "<|" not in json.dumps(failed)
        else:
            with pytest.raises(APIStatusError) as caught:
                client.responses.create(**REQUEST)
            assert (caught.value.status_code, caught.value.code) == (503, "unavailable")


def test_the_first_events_come_before_the_prompt_is_computed_and_in_progress_is_repeated() -> None:
    with (
        stepped_server(ServerOptions(keepalive_s=0.05)) as server,
        open_stream(server, max_output_tokens=3) as connection,
    ):
        sent = receive_until(connection, b"event: response.in_progress", 3)
        assert b"event: response.created" in sent.partition(b"response.in_progress")[0]
        with stepping(server):
            rest = receive_until(connection, b"[DONE]")
    chunks = parse_answer(sent + rest)
    assert chunks.headers["content-type"].startswith("text/event-stream")
    assert b": keep-alive" not in chunks.body


def test_without_keep_alives_in_progress_is_sent_once() -> None:
    with (
        stepped_server(ServerOptions("off", keepalive_s=0.01)) as server,
        open_stream(server, max_output_tokens=3) as connection,
    ):
        receive_until(connection, b"event: response.in_progress")
        wait_until(lambda: bool(server.tokens.plans), "the prompt begins")
        server.tokens.run(lambda: len(server.tokens.plans) > 2)
        with stepping(server):
            assert b"in_progress" not in receive_until(connection, b"[DONE]").replace(b'"status":"in_progress"', b"")


def test_a_client_that_hangs_up_ends_its_request() -> None:
    with stepped_server() as server:
        connection = open_stream(server)
        wait_until(lambda: bool(server.tokens.plans), "the prompt begins")
        connection.close()
        wait_until(lambda: server.num_used == 0, "the request is gone")


def test_a_request_is_cancelled_by_the_id_of_its_response() -> None:
    with stepped_server() as server, open_stream(server) as connection:
        sent = receive_until(connection, b"event: response.in_progress")
        data = next(line for line in sent.decode().splitlines() if line.startswith("data: "))
        response_id = json.loads(data.removeprefix("data: "))["response"]["id"]
        assert server.request("POST", f"/v1/requests/{response_id}/cancel").json["cancelled"]
        with stepping(server):
            assert b"response.completed" in receive_until(connection, b"[DONE]")


def test_a_prompt_that_does_not_fit_is_a_status_or_a_failed_response(calling_server: Forced) -> None:
    client = calling_server[1]
    long = "a b c d " * 4000
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(**REQUEST | {"input": long})
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    events: list[Any] = list(client.responses.create(**REQUEST | {"input": long}, stream=True))
    assert [event.type for event in events] == ["response.created", "response.failed"]
    error = events[-1].response.error
    assert error.code == "context_length_exceeded"
    assert "maximum context length" in error.message


def test_tools_that_are_left_out_are_named_in_a_warning(calling_server: Forced) -> None:
    answer = calling_server[0].request("POST", PATH, REQUEST | {"tools": [*FUNCTIONS, {"type": "web_search"}]})
    assert '299 mlx-k2 "tools of these types are left out: web_search"' in answer.headers["warning"]


def test_one_call_is_made_without_parallel_calls(calling_server: Forced) -> None:
    body = create_response(calling_server[0], parallel_tool_calls=False)
    assert [item["call_id"] for item in body["output"] if item["type"] == "function_call"] == ["functions.f:0"]
    assert fields_of(stream_response(calling_server[0], parallel_tool_calls=False)) == fields_of(body)


# ---- the store


def test_a_stored_response_is_read_again_and_deleted(calling_server: Forced) -> None:
    client = calling_server[1]
    response = client.responses.create(**REQUEST)
    assert client.responses.retrieve(response.id).to_dict() == response.to_dict()
    client.responses.delete(response.id)
    for again in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(NotFoundError):
            again(response.id)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_response_continues_the_previous_one(calling_server: Forced, is_streamed: bool) -> None:
    """The prompt is the one of the whole conversation, and the cache has the model's turn with its reasoning."""
    server, client, _ = calling_server
    first = stream_response(server) if is_streamed else create_response(server)
    second = client.responses.create(
        **REQUEST | {"input": RESULTS}, previous_response_id=first["id"], max_output_tokens=1
    )
    restated = client.responses.create(**REQUEST | {"input": [*USER, *first["output"], *RESULTS]}, max_output_tokens=1)
    assert second.usage is not None
    assert restated.usage is not None
    assert second.usage.input_tokens == restated.usage.input_tokens
    written = first["usage"]["input_tokens"] + first["usage"]["output_tokens"]
    assert second.usage.input_tokens_details.cached_tokens >= written - 1
    third = client.responses.create(**REQUEST | {"input": "b"}, previous_response_id=second.id, max_output_tokens=1)
    assert third.usage is not None
    assert third.usage.input_tokens > second.usage.input_tokens


def test_a_response_that_is_not_stored_is_not_found(calling_server: Forced) -> None:
    client = calling_server[1]
    response = client.responses.create(**REQUEST, store=False)
    with pytest.raises(NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(**REQUEST, previous_response_id=response.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


def test_instructions_hold_for_one_response_and_the_turn_is_found_all_the_same(calling_server: Forced) -> None:
    server, client, _ = calling_server
    first = client.responses.create(**REQUEST, instructions="Instructions of the first response.")
    fields = REQUEST | {"input": RESULTS, "previous_response_id": first.id, "max_output_tokens": 1}
    second = client.responses.create(**fields)
    calls = [
        {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
        for item in first.output
        if item.type == "function_call"
    ]
    turn = {"role": "assistant", "content": "I call.", "reasoning_content": "Think first.", "tool_calls": calls}
    results = [{"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]} for item in RESULTS]
    assert second.usage is not None
    assert second.usage.input_tokens == len(prompt_of(server, messages=[*USER, turn, *results], tools=TOOLS))


@pytest.mark.parametrize("lost", ["the text", "the handle", "the reasoning"])
def test_lost_reasoning_is_put_back(calling_server: Forced, lost: str) -> None:
    """A client may send the reasoning as text, the handle alone, or nothing."""
    client = calling_server[1]
    first = client.responses.create(**REQUEST, store=False)
    output = [item.to_dict() for item in first.output]
    kept: dict[str, list[Any]] = {
        "the text": [output[0] | {"content": None}],
        "the handle": [output[0] | {"encrypted_content": None}],
        "the reasoning": [],
    }
    requests = ([*USER, *begin, *output[1:], *RESULTS] for begin in (output[:1], kept[lost]))
    full_usage, usage = (
        client.responses.create(**REQUEST | {"input": items}, store=False, max_output_tokens=1).usage
        for items in requests
    )
    assert full_usage is not None
    assert usage is not None
    assert usage.input_tokens == full_usage.input_tokens


def test_two_keys_never_see_each_others_responses_and_handles(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    alice, bob = add_key(path, "alice"), add_key(path, "bob")
    with (
        forced_server(REPLIES["calls"][0], keys=KeyRing(path, is_required=True), key=alice) as (server, client, _),
        stepping(server),
    ):
        other = OpenAI(base_url=f"{server.url}/v1", api_key=bob, max_retries=0, timeout=WAIT_S)
        response = client.responses.create(**REQUEST)
        for not_found in (other.responses.retrieve, other.responses.delete):
            with pytest.raises(NotFoundError):
                not_found(response.id)
        with pytest.raises(BadRequestError):
            other.responses.create(**REQUEST, previous_response_id=response.id)
        reasoning, *rest = [item.to_dict() for item in response.output]
        assert reasoning["encrypted_content"]
        handle = reasoning | {"content": None}
        changed = [{"role": "user", "content": "b"}]  # found by the handle alone

        def num_tokens(who: OpenAI, *items: Any) -> int:
            request = REQUEST | {"input": [*changed, *items, *rest, *RESULTS]}
            usage = who.responses.create(**request, max_output_tokens=1).usage
            assert usage is not None
            return usage.input_tokens

        assert num_tokens(client, handle) > num_tokens(client)
        assert num_tokens(other, handle) == num_tokens(other) == num_tokens(client)
        assert client.responses.retrieve(response.id).id == response.id
