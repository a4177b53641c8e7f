"""Tests of the Messages API with Anthropic's official client, over HTTP."""

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from anthropic import APIStatusError, AsyncAnthropic, BadRequestError

from mlx_k2.server import access, routes
from mlx_k2.server.api_errors import ApiError
from mlx_k2.server.api_keys import KeyRing, add_key
from mlx_k2.server.server_state import ServerOptions
from tests.server.forced_replies import CALLS_REPLY, REPLIES, TEXT_REPLY, USER_MESSAGES, forced_server
from tests.server.http_client import WAIT_S, HttpAnswer, receive_until
from tests.server.in_process import SteppedServer, stepped_server
from tests.server.messages_client import (
    CLIENT_TOOLS,
    MESSAGES_PATH,
    client_of,
    comparable_fields,
    create_message,
    error_of,
    stream_message,
)
from tests.server.server_process import Server
from tests.text.replies import call, section

MAX_TOKENS = {"max_tokens": 9}
STOP_SEQUENCE = {"stop_sequences": ["answer"]}
OMITTED_THINKING = {"thinking": {"type": "adaptive", "display": "omitted"}}


@pytest.mark.parametrize("name", REPLIES)
def test_the_client_accumulates_the_body_of_every_kind_of_reply(name: str) -> None:
    with forced_server(REPLIES[name].text) as server:
        client = client_of(server)
        variants: tuple[dict[str, Any], ...] = ({}, MAX_TOKENS, STOP_SEQUENCE, OMITTED_THINKING)
        for fields in variants:
            body = create_message(client, **fields)
            assert comparable_fields(stream_message(client, **fields)) == comparable_fields(body)
        content = create_message(client)["content"]
    calls = [(block["id"], block["name"], block["input"]) for block in content if block["type"] == "tool_use"]
    if "calls" in name:
        assert calls == [
            ("functions.f:0", "f", {"text": "one two three four five"}),
            ("functions.mcp__a-b.c:1", "mcp__a-b.c", {"number": 5777}),
        ]
    # broken arguments are text: see below
    assert bool(calls) is (REPLIES[name].finish_reason == "tool_calls" and name != "broken arguments")


def test_the_asynchronous_client_accumulates_the_same() -> None:
    async def receive(url: str) -> list[dict[str, Any]]:
        request: Any = {"model": "m", "max_tokens": 500, "messages": USER_MESSAGES, "tools": CLIENT_TOOLS}
        async with AsyncAnthropic(base_url=url, api_key="any", max_retries=0, timeout=WAIT_S) as client:
            body = (await client.messages.create(**request)).to_dict()
            async with client.messages.stream(**request) as stream:
                return [body, (await stream.get_final_message()).to_dict()]

    with forced_server(CALLS_REPLY) as server:
        expected = comparable_fields(create_message(client_of(server)))
        assert [comparable_fields(message) for message in asyncio.run(receive(server.url))] == [expected] * 2


@pytest.mark.parametrize(
    ("fields", "stop_reason", "stop_sequence"),
    [({}, "end_turn", None), (MAX_TOKENS, "max_tokens", None), (STOP_SEQUENCE, "stop_sequence", "answer")],
)
def test_the_stop_reasons_are_anthropics(fields: dict[str, Any], stop_reason: str, stop_sequence: str | None) -> None:
    with forced_server(TEXT_REPLY) as server:
        message = create_message(client_of(server), **fields)
    assert (message["stop_reason"], message["stop_sequence"]) == (stop_reason, stop_sequence)


@pytest.mark.parametrize("arguments", ['{"a": ', '{"a": "b'])
@pytest.mark.parametrize("receive", [create_message, stream_message])
def test_broken_arguments_are_text_and_never_a_tool_use(arguments: str, receive: Any) -> None:
    """Forced tokens are not restricted by the grammar, which gives a real model no such arguments."""
    reply = "<think></think>" + section(call("functions.f:0", arguments), call("functions.f:1", '{"b": 2}'))
    with forced_server(reply) as server:
        text, tool_use = receive(client_of(server))["content"]
    assert text == {"type": "text", "text": "functions.f:0" + arguments}
    assert (tool_use["type"], tool_use["input"]) == ("tool_use", {"b": 2})


@pytest.mark.parametrize("receive", [create_message, stream_message])
def test_missing_arguments_are_an_empty_object(receive: Any) -> None:
    with forced_server("<think></think>" + section(call("functions.f:0", ""))) as server:
        (tool_use,) = receive(client_of(server))["content"]
    assert (tool_use["type"], tool_use["input"]) == ("tool_use", {})


def test_only_an_eager_tool_streams_its_arguments_as_they_are_sampled() -> None:
    eager_tools = [{**tool, "eager_input_streaming": True} for tool in CLIENT_TOOLS]

    def num_deltas(server: SteppedServer, tools: list[Any]) -> int:
        request = {"max_tokens": 500, "messages": USER_MESSAGES, "tools": tools, "stream": True}
        return server.request("POST", MESSAGES_PATH, request).body.count(b"input_json_delta")

    with forced_server(CALLS_REPLY) as server:
        assert num_deltas(server, CLIENT_TOOLS) == 2, "not one delta for each call"
        assert num_deltas(server, eager_tools) > 8
        eager_message = stream_message(client_of(server), tools=eager_tools)
        assert comparable_fields(eager_message) == comparable_fields(create_message(client_of(server)))


def test_a_stream_begins_with_the_prompts_tokens_and_a_ping() -> None:
    prompt: dict[str, Any] = {"messages": USER_MESSAGES, "tools": CLIENT_TOOLS}
    with forced_server(TEXT_REPLY) as server:
        num_prompt_tokens = client_of(server).messages.count_tokens(model="m", **prompt).input_tokens
        answer = server.request("POST", MESSAGES_PATH, prompt | {"max_tokens": 20, "stream": True})
    start, ping, *_, stop = answer.events
    assert start["message"]["usage"]["input_tokens"] == num_prompt_tokens
    assert [event["type"] for event in (start, ping, stop)] == ["message_start", "ping", "message_stop"]
    names = [line for line in answer.body.decode().split("\n") if line.startswith("event: ")]
    assert names == [f"event: {event['type']}" for event in answer.events]
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


def test_pings_are_sent_while_nothing_is_computed() -> None:
    request = {"max_tokens": 5, "messages": USER_MESSAGES, "stream": True}
    with (
        stepped_server(ServerOptions(keepalive_s=0.02)) as server,
        server.send("POST", MESSAGES_PATH, request) as connection,
    ):
        receive_until(connection, b'event: ping\ndata: {"type":"ping"}\n\n', count=3)


def test_max_tokens_0_computes_the_prompt_and_answers_nothing() -> None:
    with forced_server(TEXT_REPLY) as server:
        client = client_of(server)
        empty = create_message(client, max_tokens=0)
        assert (empty["content"], empty["stop_reason"], empty["usage"]["output_tokens"]) == ([], "max_tokens", 0)
        assert comparable_fields(stream_message(client, max_tokens=0)) == comparable_fields(empty)
        usage = create_message(client)["usage"]
        assert usage["input_tokens"] == 1, "more than the last position was computed"
        assert usage["cache_read_input_tokens"] == empty["usage"]["input_tokens"] - 1


def test_a_full_queue_is_529_with_the_time_to_wait() -> None:
    with stepped_server(max_queued=1) as server:
        body = {"max_tokens": 5, "messages": USER_MESSAGES, "stream": True}
        running = server.send("POST", MESSAGES_PATH, body)
        server.wait_for_plan()
        waiting = server.send("POST", MESSAGES_PATH, body)
        server.wait_for_requests(2)
        with pytest.raises(APIStatusError) as caught:
            create_message(client_of(server))
        count = client_of(server).messages.count_tokens(model="m", messages=USER_MESSAGES)
        running.close()
        waiting.close()
    assert (caught.value.status_code, error_of(caught.value.body)[0]) == (529, "overloaded_error")
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert count.input_tokens > 0  # it did not wait for the full queue


def test_each_key_may_count_50_times_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert routes.COUNTS_PER_S == 50
    monkeypatch.setattr(routes, "COUNTS_PER_S", 3)  # 3 at once and 3 a second: 30 would need 9 s
    keys = [add_key(tmp_path / "keys", name) for name in ("alice", "bob")]
    path = f"{MESSAGES_PATH}/count_tokens"
    with stepped_server(keys=KeyRing(tmp_path / "keys", is_required=True)) as server:

        def count(key: str) -> HttpAnswer:
            return server.request("POST", path, {"messages": USER_MESSAGES}, **{"x-api-key": key})

        answers = [count(keys[0]) for _ in range(30)]
        assert [answer.status for answer in answers[:3]] == [200] * 3
        refused = [answer for answer in answers if answer.status != 200]
        assert {answer.status for answer in refused} == {429}
        assert error_of(refused[0].json)[0] == "rate_limit_error"
        assert refused[0].headers["retry-after"] == "1"
        assert count(keys[1]).status == 200


def test_the_limit_of_a_rate_allows_a_burst_and_then_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(access, "time", SimpleNamespace(monotonic=lambda: now[0]))
    limit = access.RateLimit(50)
    num_allowed = 0
    for _ in range(1000):  # 10 s at 100 a second
        now[0] += 0.01
        with suppress(ApiError):
            limit.check("alice")
            num_allowed += 1
    assert 545 <= num_allowed <= 550, "not a burst of 50, and 50 a second"


def test_lost_reasoning_comes_back_by_conversation_or_by_signature_and_for_its_key_only(tmp_path: Path) -> None:
    keys = {name: add_key(tmp_path / "keys", name) for name in ("alice", "bob")}
    ring = KeyRing(tmp_path / "keys", is_required=True)
    reply = REPLIES["calls within the reasoning"].text
    with forced_server(reply, keys=ring, key=keys["alice"]) as server:
        thinking, *calls = create_message(client_of(server, keys["alice"]))["content"]
        assert thinking["thinking"] == "Think first."
        results = [{"type": "tool_result", "tool_use_id": block["id"], "content": "r"} for block in calls]
        signature_only = thinking | {"thinking": ""}
        changed_question = [{"role": "user", "content": "changed"}]

        def num_prompt_tokens(name: str, question: list[Any], answer: list[Any]) -> int:
            turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": results}]
            messages: Any = [*question, *turns]
            client = client_of(server, keys[name])
            return client.messages.count_tokens(model="m", messages=messages, tools=CLIENT_TOOLS).input_tokens

        for question, answer in (
            (USER_MESSAGES, calls),
            (USER_MESSAGES, [signature_only, *calls]),
            (changed_question, [signature_only, *calls]),
        ):
            num_complete = num_prompt_tokens("bob", question, [thinking, *calls])
            assert num_prompt_tokens("alice", question, answer) == num_complete
            assert num_prompt_tokens("bob", question, answer) < num_complete
        unknown = thinking | {"thinking": "", "signature": "unknown"}
        num_without_reasoning = num_prompt_tokens("bob", changed_question, calls)
        assert num_prompt_tokens("alice", changed_question, [unknown, *calls]) == num_without_reasoning


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_forced_call_is_made_and_disable_parallel_tool_use_makes_one(server: Server, choice: Any) -> None:
    tool: Any = {
        "name": "get_weather",
        "input_schema": {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]},
    }
    choice = {**choice, "disable_parallel_tool_use": True}
    client = client_of(server)
    thinking = {"type": "enabled", "budget_tokens": 20}
    message = create_message(client, max_tokens=300, tools=[tool], tool_choice=choice, thinking=thinking)
    (block,) = [block for block in message["content"] if block["type"] == "tool_use"]
    assert (block["name"], block["input"], message["stop_reason"]) == ("get_weather", {"city": "Paris"}, "tool_use")


def test_tool_choice_none_calls_no_tool(server: Server) -> None:
    tools: Any = [{"name": "get_weather", "input_schema": {"type": "object"}}]
    message = create_message(client_of(server), max_tokens=40, tools=tools, tool_choice={"type": "none"})
    assert all(block["type"] != "tool_use" for block in message["content"])


def test_an_answer_with_a_schema_is_valid(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"sky": {"enum": ["sunny", "cloudy"]}},
        "required": ["sky"],
        "additionalProperties": False,
    }
    request: Any = {
        "model": "m",
        "max_tokens": 300,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "output_config": {"format": {"type": "json_schema", "schema": schema}},
        "thinking": {"type": "enabled", "budget_tokens": 20},
    }
    message = client_of(server).messages.create(**request)
    text = "".join(block.text for block in message.content if block.type == "text")
    assert json.loads(text)["sky"] in ("sunny", "cloudy")


@pytest.mark.parametrize(
    ("fields", "message_part"),
    [
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": "many"}, "max_tokens: expected a whole number"),
        ({"messages": []}, "there is no message"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role is 'robot'"),
        ({"messages": [*USER_MESSAGES, {"role": "assistant", "content": "b"}]}, "end with a user's"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"output_config": {"effort": "extreme"}}, "output_config.effort 'extreme' is unknown"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 7}}}}, "output_config.format"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type is 'some'"),
        ({"tool_choice": {"type": "tool", "name": "g"}}, "tool_choice names 'g', which is not declared"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0] is"),
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, "prompt is too long: "),
    ],
)
def test_a_refused_request_is_400_in_anthropics_shape(
    fast_server: SteppedServer, fields: dict[str, Any], message_part: str
) -> None:
    with pytest.raises(BadRequestError) as caught:
        create_message(client_of(fast_server), **fields)
    kind, message = error_of(caught.value.body)
    assert kind == "invalid_request_error"
    assert message_part in message
    assert caught.value.request_id


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "kind"),
    [
        ("POST", "/v1/messages/nothing", {}, 404, "not_found_error"),
        ("GET", MESSAGES_PATH, {}, 405, "invalid_request_error"),
        ("POST", MESSAGES_PATH, {"Host": "evil.example"}, 403, "permission_error"),
        ("POST", MESSAGES_PATH, {"Content-Encoding": "gzip"}, 415, "invalid_request_error"),
        ("POST", MESSAGES_PATH, {"Content-Length": "999999999"}, 413, "request_too_large"),
    ],
)
def test_every_error_of_these_paths_is_in_anthropics_shape(
    fast_server: SteppedServer, method: str, path: str, headers: dict[str, str], status: int, kind: str
) -> None:
    body = b"" if "Content-Length" in headers else {}  # a body that is too large is not sent
    answer = fast_server.request(method, path, body, **headers)
    assert (answer.status, error_of(answer.json)[0]) == (status, kind)
    assert answer.json["request_id"] == answer.headers["request-id"]


def test_a_wrong_key_is_401_in_anthropics_shape(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "alice")
    with stepped_server(keys=KeyRing(tmp_path / "keys", is_required=True)) as server:
        body = {"messages": USER_MESSAGES}
        path = f"{MESSAGES_PATH}/count_tokens?beta=true"
        answer = server.request("POST", path, body, **{"x-api-key": "wrong"})
        assert (answer.status, error_of(answer.json)[0]) == (401, "authentication_error")
        headers = {"x-api-key": key, "anthropic-version": "2023-06-01", "anthropic-beta": "unknown-2030-01-01"}
        assert server.request("POST", path, body, **headers).status == 200


def test_an_error_in_the_middle_of_a_stream_is_an_error_event() -> None:
    with forced_server(CALLS_REPLY) as server:
        server.fail_once(index=20, restarts=False)
        with pytest.raises(APIStatusError) as caught:
            stream_message(client_of(server))
        assert error_of(caught.value.body)[0] == "api_error"


@pytest.mark.parametrize("index", [3, 40])
def test_a_restart_in_the_middle_of_a_reply_changes_nothing(index: int) -> None:
    with forced_server(CALLS_REPLY) as server:
        body = create_message(client_of(server))
        server.fail_once(index, restarts=True)
        assert comparable_fields(stream_message(client_of(server))) == comparable_fields(body)
        assert len(server.harness.restarts) == 1


def test_the_client_lists_the_model(fast_server: SteppedServer) -> None:
    (model,) = client_of(fast_server).models.list().data
    assert (model.id, model.type, model.display_name) == ("tokens", "model", "tokens")
