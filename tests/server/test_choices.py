"""Tests of requests for several choices, and of the limit for requests that are not in the engine yet."""

import contextlib
import json
import socket
from typing import Any

from mlx_k2.server.routes import warning_headers
from tests.server.in_process import SteppedServer, stepped_server, stepping, wait_until
from tests.server.server_process import WAIT_S, Server
from tests.server.test_life_of_a_request import LONG_PROMPT, answer_of, send_chat

CHAT = "/v1/chat/completions"
REQUEST: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 17 plus 25?"}], "seed": 3}


def choices_of(stream: bytes) -> dict[int, dict[str, Any]]:
    """Return the text and the finish reason of each choice of a stream."""
    choices: dict[int, dict[str, Any]] = {}
    for line in stream.split(b"\n"):
        for choice in json.loads(line[6:])["choices"] if line.startswith(b"data: {") else ():
            fields = choices.setdefault(choice["index"], {"content": "", "roles": 0, "finish_reason": None})
            fields["content"] += choice["delta"].get("reasoning_content", "") + choice["delta"].get("content", "")
            fields["roles"] += "role" in choice["delta"]
            fields["finish_reason"] = fields["finish_reason"] or choice["finish_reason"]
    return choices


def text_of(message: dict[str, Any]) -> str:
    """Return the reasoning and the content of an answer."""
    return str(message.get("reasoning_content", "") + message["content"])


def test_several_choices_are_those_of_single_requests_with_their_seeds_streamed_and_not(server: Server) -> None:
    fields = REQUEST | {"temperature": 4.0, "max_tokens": 30}
    body = server.request("POST", CHAT, fields | {"n": 3}).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    contents = [text_of(choice["message"]) for choice in body["choices"]]
    assert len(set(contents)) == 3
    single = server.request("POST", CHAT, fields).json
    assert contents[0] == text_of(single["choices"][0]["message"])
    assert body["usage"]["prompt_tokens"] == single["usage"]["prompt_tokens"]
    streamed = choices_of(server.request("POST", CHAT, fields | {"n": 3, "stream": True}).body)
    assert [streamed[index]["content"] for index in range(3)] == contents
    assert [streamed[index]["finish_reason"] for index in range(3)] == [
        choice["finish_reason"] for choice in body["choices"]
    ]
    assert all(choice["roles"] == 1 for choice in streamed.values())


def test_several_choices_compute_their_prompt_once_and_end_together() -> None:
    with stepped_server(num_slots=4, chunk_tokens=64) as server, stepping(server):
        options = {"include_usage": True}
        answer = answer_of(send_chat(server, LONG_PROMPT, n=4, max_tokens=5, stream=True, stream_options=options))
        usage = json.loads(answer.body.split(b"data: ")[-2])["usage"]
        num_computed = sum(len(row.token_ids) for step in server.tokens.plans for row in step.rows)
        assert usage["prompt_tokens"] > 150
        assert num_computed < 2 * usage["prompt_tokens"]
        assert answer.body.count(b"[DONE]") == 1
        assert usage["completion_tokens"] == 20
        wait_until(lambda: server.num_used == 0, "all choices are gone")


def test_a_hang_up_or_a_cancellation_ends_all_choices() -> None:
    with stepped_server(num_slots=4) as server:
        connection = send_chat(server, n=3, stream=True)
        wait_until(lambda: server.num_used == 3, "three choices run")
        assert len(server.request("GET", "/v1/status").json["requests"]) == 3
        connection.close()
        wait_until(lambda: server.num_used == 0, "none runs")
        connection = send_chat(server, n=3)
        wait_until(lambda: len(server.state.records) == 3 and server.num_used == 3, "three choices run")
        request_id = next(iter(server.state.records))
        assert server.request("POST", f"/v1/requests/{request_id}/cancel").status == 200
        assert len(answer_of(connection).json["choices"]) == 3


def test_requests_whose_bodies_are_not_complete_count_as_queued() -> None:
    """Slots and queue hold 3 requests: the fourth body is refused before it is read."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n".encode()
    with stepped_server(num_slots=1, max_queued=2) as server, contextlib.ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S))
            connection.sendall(head)
        wait_until(lambda: server.state._num_preparing[True] == 3, "three bodies are awaited")
        refused = server.request("POST", CHAT, REQUEST)
        assert (refused.status, refused.error["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        stack.close()
        wait_until(lambda: server.state._num_preparing[True] == 0, "their clients are gone")
        assert tokenize_status(server) == 200


def tokenize_status(server: SteppedServer) -> int:
    return server.request("POST", "/tokenize", {"prompt": "a"}).status


def test_tokens_are_counted_while_the_queue_is_full() -> None:
    with stepped_server(num_slots=1, max_queued=1) as server:
        connections = [send_chat(server, stream=True)]
        wait_until(lambda: bool(server.tokens.plans), "the first request runs")
        connections.append(send_chat(server, stream=True))
        wait_until(lambda: server.num_used == 2, "slot and queue are full")
        assert server.request("POST", CHAT, REQUEST).status == 429
        assert tokenize_status(server) == 200
        for connection in connections:
            connection.close()
        wait_until(lambda: server.num_used == 0, "both are gone")


def test_warnings_become_one_header_of_harmless_characters() -> None:
    assert warning_headers([]) == {}
    header = warning_headers(['the "schema"\r\nset-cookie: a=b', "snö\x00w\\", "a" * 1000])["warning"]
    assert header.startswith('299 mlx-k2 "the ?schema???set-cookie: a=b", 299 mlx-k2 "sn??w?", 299 mlx-k2 "aaa')
    assert len(header) < 500
