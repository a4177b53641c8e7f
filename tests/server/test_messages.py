"""Tests of the Messages API with Anthropic's official client, over HTTP."""

import asyncio
import json
from collections.abc import Iterator
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
from tests.server.forced_replies import REPLIES, forced_server
from tests.server.in_process import SteppedServer, stepped_server, stepping, wait_until
from tests.server.messages_client import (
    CLIENT_TOOLS,
    MESSAGES,
    USER,
    accumulate,
    client_of,
    error_of,
    fields_of,
    message_of,
)
from tests.server.server_process import WAIT_S, HttpAnswer, Server
from tests.server.test_life_of_a_request import receive_until, send
from tests.text.replies import call, section

ENDS: dict[str, dict[str, Any]] = {
    "length": {"max_tokens": 9},
    "stop": {"stop_sequences": ["answer"]},
    "no thinking shown": {"thinking": {"type": "adaptive", "display": "omitted"}},
}


@pytest.fixture(scope="module")
def ready_server() -> Iterator[SteppedServer]:
    """A server that answers at once with random tokens."""
    with stepped_server(num_slots=4, chunk_tokens=512) as server, stepping(server):
        yield server


@pytest.mark.parametrize("name", REPLIES)
def test_the_client_accumulates_the_body_of_every_kind_of_reply(name: str) -> None:
    reply, finish_reason = REPLIES[name]
    with forced_server(reply) as (server, _, _), stepping(server):
        client = client_of(server)
        for fields in ({}, *ENDS.values()):
            body = message_of(client, **fields)
            assert fields_of(accumulate(client, **fields)) == fields_of(body)
        content = message_of(client)["content"]
    calls = [(block["id"], block["name"], block["input"]) for block in content if block["type"] == "tool_use"]
    if "calls" in name:
        inputs = ({"text": "one two three four five"}, {"number": 5777})
        assert calls == list(zip(("functions.f:0", "functions.mcp__a-b.c:1"), ("f", "mcp__a-b.c"), inputs, strict=True))
    assert bool(calls) is (finish_reason == "tool_calls" and name != "broken arguments")


def test_the_asynchronous_client_accumulates_the_same() -> None:
    async def body_and_stream(url: str) -> list[dict[str, Any]]:
        request: Any = {"model": "m", "max_tokens": 500, "messages": USER, "tools": CLIENT_TOOLS}
        async with AsyncAnthropic(base_url=url, api_key="any", max_retries=0, timeout=WAIT_S) as client:
            body = (await client.messages.create(**request)).to_dict()
            async with client.messages.stream(**request) as stream:
                return [body, (await stream.get_final_message()).to_dict()]

    with forced_server(REPLIES["calls"][0]) as (server, _, _), stepping(server):
        body, streamed = asyncio.run(body_and_stream(server.url))
        assert fields_of(streamed) == fields_of(body) == fields_of(message_of(client_of(server)))


def test_the_reasons_of_the_end_are_anthropics() -> None:
    with forced_server(REPLIES["text"][0]) as (server, _, _), stepping(server):
        client = client_of(server)
        ends = [
            (message["stop_reason"], message["stop_sequence"])
            for message in (
                message_of(client),
                message_of(client, **ENDS["length"]),
                message_of(client, **ENDS["stop"]),
            )
        ]
    assert ends == [("end_turn", None), ("max_tokens", None), ("stop_sequence", "answer")]


@pytest.mark.parametrize("arguments", ['{"a": ', '{"a": "b', ""])
@pytest.mark.parametrize("send_request", [message_of, accumulate])
def test_broken_arguments_are_text_and_never_a_tool_use(arguments: str, send_request: Any) -> None:
    """The forced tokens pass by the grammar, which a real model's cannot."""
    reply = "<think></think>" + section(call("functions.f:0", arguments), call("functions.f:1", '{"b": 2}'))
    with forced_server(reply) as (server, _, _), stepping(server):
        message = send_request(client_of(server))
    inputs = [block["input"] for block in message["content"] if block["type"] == "tool_use"]
    assert inputs == ([{"b": 2}] if arguments else [{}, {"b": 2}])
    if arguments:
        assert message["content"][0] == {"type": "text", "text": "functions.f:0" + arguments}


def test_an_eager_tool_streams_its_arguments_as_they_are_sampled() -> None:
    eager = [{**tool, "eager_input_streaming": True} for tool in CLIENT_TOOLS]
    counts = []
    with forced_server(REPLIES["calls"][0]) as (server, _, _), stepping(server):
        for tools in (CLIENT_TOOLS, eager):
            request = {"max_tokens": 500, "messages": USER, "tools": tools, "stream": True}
            counts.append(server.request("POST", MESSAGES, request).body.count(b"input_json_delta"))
        assert fields_of(accumulate(client_of(server), tools=eager)) == fields_of(message_of(client_of(server)))
    assert counts[0] == 2
    assert counts[1] > 8


def test_a_stream_begins_with_the_prompts_tokens_and_a_ping() -> None:
    with forced_server(REPLIES["text"][0]) as (server, _, _), stepping(server):
        counted = client_of(server).messages.count_tokens(model="m", messages=USER, tools=CLIENT_TOOLS).input_tokens
        request = {"max_tokens": 20, "messages": USER, "tools": CLIENT_TOOLS, "stream": True}
        answer = server.request("POST", MESSAGES, request)
        lines = [line for line in answer.body.decode().split("\n") if line.startswith(("event: ", "data: "))]
    events = list(zip(lines[::2], lines[1::2], strict=True))
    for name, data in events:
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert [name for name, _ in events[:2]] == ["event: message_start", "event: ping"]
    assert json.loads(events[0][1].removeprefix("data: "))["message"]["usage"]["input_tokens"] == counted
    assert events[-1][0] == "event: message_stop"
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


def test_pings_are_sent_while_nothing_is_computed() -> None:
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'
    with stepped_server(ServerOptions(keepalive_s=0.02)) as server:
        connection = send(server, "POST", MESSAGES, {"max_tokens": 5, "messages": USER, "stream": True})
        received = b""
        for _ in range(3):
            received = receive_until(connection, ping, received).partition(ping)[2]
        connection.close()


def test_max_tokens_0_computes_the_prompt_and_answers_nothing() -> None:
    with forced_server(REPLIES["text"][0]) as (server, _, _), stepping(server):
        client = client_of(server)
        warm = message_of(client, max_tokens=0)
        assert (warm["content"], warm["stop_reason"], warm["usage"]["output_tokens"]) == ([], "max_tokens", 0)
        assert fields_of(accumulate(client, max_tokens=0)) == fields_of(warm)
        after = message_of(client)["usage"]
        assert after["input_tokens"] == 1
        assert after["cache_read_input_tokens"] == warm["usage"]["input_tokens"] - 1


def test_a_full_queue_is_529_with_the_time_to_wait() -> None:
    with stepped_server(max_queued=1) as server:
        body = {"max_tokens": 5, "messages": USER, "stream": True}
        connections = [send(server, "POST", MESSAGES, body)]
        wait_until(lambda: bool(server.tokens.plans), "the first request runs")
        connections.append(send(server, "POST", MESSAGES, body))
        wait_until(lambda: server.num_used == 2, "both requests are there")
        with pytest.raises(APIStatusError) as caught:
            message_of(client_of(server))
        counted = client_of(server).messages.count_tokens(model="m", messages=USER)
        for connection in connections:
            connection.close()
    assert (caught.value.status_code, error_of(caught.value.body)[0]) == (529, "overloaded_error")
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert counted.input_tokens > 0, "a count waits for nothing"


def test_each_key_may_count_50_times_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert routes.COUNTS_PER_S == 50
    monkeypatch.setattr(routes, "COUNTS_PER_S", 3)  # more than any machine is too slow to send
    keys = [add_key(tmp_path / "keys", name) for name in ("alice", "bob")]
    path = f"{MESSAGES}/count_tokens"
    with stepped_server(keys=KeyRing(tmp_path / "keys", is_required=True)) as server:

        def count(key: str) -> HttpAnswer:
            return server.request("POST", path, {"messages": USER}, **{"x-api-key": key})

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
    assert 545 <= num_allowed <= 550


def test_lost_reasoning_comes_back_by_conversation_or_by_signature_and_for_its_key_only(tmp_path: Path) -> None:
    keys = {name: add_key(tmp_path / "keys", name) for name in ("alice", "bob")}
    ring = KeyRing(tmp_path / "keys", is_required=True)
    reply = REPLIES["calls within the reasoning"][0]
    with forced_server(reply, keys=ring, key=keys["alice"]) as (server, _, _), stepping(server):
        content = message_of(client_of(server, keys["alice"]))["content"]
        assert content[0]["thinking"] == "Think first."
        results = [{"type": "tool_result", "tool_use_id": block["id"], "content": "r"} for block in content[1:]]
        result = {"role": "user", "content": results}
        empty = {**content[0], "thinking": ""}
        changed = [{"role": "user", "content": "changed"}]

        def num_prompt(name: str, before: list[Any], answer: list[Any]) -> int:
            messages: Any = [*before, {"role": "assistant", "content": answer}, result]
            client = client_of(server, keys[name])
            return client.messages.count_tokens(model="m", messages=messages, tools=CLIENT_TOOLS).input_tokens

        for before, answer in ((USER, content[1:]), (USER, [empty, *content[1:]]), (changed, [empty, *content[1:]])):
            sent = num_prompt("bob", before, content)
            assert num_prompt("alice", before, answer) == sent
            assert num_prompt("bob", before, answer) < sent
        unknown = [{**empty, "signature": "unknown"}, *content[1:]]
        assert num_prompt("alice", changed, unknown) == num_prompt("bob", changed, content[1:])


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_forced_call_is_made_and_disable_parallel_tool_use_makes_one(server: Server, choice: Any) -> None:
    tool: Any = {
        "name": "get_weather",
        "input_schema": {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]},
    }
    choice = {**choice, "disable_parallel_tool_use": True}
    client = client_of(server)
    thinking = {"type": "enabled", "budget_tokens": 20}
    message = message_of(client, max_tokens=300, tools=[tool], tool_choice=choice, thinking=thinking)
    (block,) = [block for block in message["content"] if block["type"] == "tool_use"]
    assert (block["name"], block["input"], message["stop_reason"]) == ("get_weather", {"city": "Paris"}, "tool_use")
    none = message_of(client, max_tokens=40, tools=[tool], tool_choice={"type": "none"}, thinking=thinking)
    assert all(block["type"] != "tool_use" for block in none["content"])


def test_an_answer_in_a_schema_is_valid(server: Server) -> None:
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
    ("fields", "text"),
    [
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": "many"}, "max_tokens: expected a whole number"),
        ({"messages": []}, "there is no message"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role is 'robot'"),
        ({"messages": [*USER, {"role": "assistant", "content": "b"}]}, "end with a user's"),
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
    ready_server: SteppedServer, fields: dict[str, Any], text: str
) -> None:
    with pytest.raises(BadRequestError) as caught:
        message_of(client_of(ready_server), **fields)
    kind, message = error_of(caught.value.body)
    assert kind == "invalid_request_error"
    assert text in message
    assert caught.value.request_id


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "kind"),
    [
        ("POST", "/v1/messages/nothing", {}, 404, "not_found_error"),
        ("GET", MESSAGES, {}, 405, "invalid_request_error"),
        ("POST", MESSAGES, {"Host": "evil.example"}, 403, "permission_error"),
        ("POST", MESSAGES, {"Content-Encoding": "gzip"}, 415, "invalid_request_error"),
        ("POST", MESSAGES, {"Content-Length": "999999999"}, 413, "request_too_large"),
    ],
)
def test_every_error_of_these_paths_is_in_anthropics_shape(
    ready_server: SteppedServer, method: str, path: str, headers: dict[str, str], status: int, kind: str
) -> None:
    answer = ready_server.request(method, path, {} if "Content-Length" not in headers else b"", **headers)
    assert (answer.status, error_of(answer.json)[0]) == (status, kind)
    assert answer.json["request_id"] == answer.headers["request-id"]


def test_a_missing_key_is_401_in_anthropics_shape(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "alice")
    with stepped_server(keys=KeyRing(tmp_path / "keys", is_required=True)) as server:
        body = {"messages": USER}
        path = f"{MESSAGES}/count_tokens?beta=true"
        answer = server.request("POST", path, body, **{"x-api-key": "wrong"})
        assert (answer.status, error_of(answer.json)[0]) == (401, "authentication_error")
        headers = {"x-api-key": key, "anthropic-version": "2023-06-01", "anthropic-beta": "unknown-2030-01-01"}
        assert server.request("POST", path, body, **headers).status == 200


def test_an_error_in_the_middle_of_a_stream_is_an_error_event() -> None:
    with forced_server(REPLIES["calls"][0]) as (server, _, stages), stepping(server):
        stages.fail_at = 20
        server.tokens.cancel()
        with pytest.raises(APIStatusError) as caught:
            accumulate(client_of(server))
        assert error_of(caught.value.body)[0] == "api_error"


@pytest.mark.parametrize("at", [3, 40])
def test_a_restart_in_the_middle_of_a_reply_changes_nothing(at: int) -> None:
    with forced_server(REPLIES["calls"][0]) as (server, _, stages), stepping(server):
        body = message_of(client_of(server))
        stages.fail_at = at
        server.tokens.may_restart.set()
        assert fields_of(accumulate(client_of(server))) == fields_of(body)
        assert len(server.tokens.restarts) == 1


def test_the_client_lists_the_model(ready_server: SteppedServer) -> None:
    (model,) = client_of(ready_server).models.list().data
    assert (model.id, model.type, model.display_name) == ("tokens", "model", "tokens")
