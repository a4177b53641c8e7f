"""Tests of requests for several choices, and of the limit for requests that are not in the engine yet."""

import contextlib
from typing import Any

from mlx_k2.server.routes import warning_headers
from tests.server.chat_client import SUM_QUESTION
from tests.server.http_client import CHAT_PATH, receive_answer
from tests.server.in_process import LONG_PROMPT, SteppedServer, stepped_server, wait_until
from tests.server.server_process import Server

REQUEST: dict[str, Any] = {"messages": SUM_QUESTION, "seed": 3}


def text_of(message: dict[str, Any]) -> str:
    """Return the reasoning and the content of a message, or of a delta."""
    return str(message.get("reasoning_content", "") + message.get("content", ""))


def test_the_first_of_several_choices_equals_the_choice_of_a_single_request(server: Server) -> None:
    request = REQUEST | {"temperature": 4.0, "max_tokens": 30}
    body = server.request("POST", CHAT_PATH, request | {"n": 3}).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    texts = [text_of(choice["message"]) for choice in body["choices"]]
    assert len(set(texts)) == 3
    single = server.request("POST", CHAT_PATH, request).json
    assert text_of(single["choices"][0]["message"]) == texts[0]
    assert single["usage"]["prompt_tokens"] == body["usage"]["prompt_tokens"]


def test_several_choices_are_streamed_as_in_the_body(server: Server) -> None:
    request = REQUEST | {"temperature": 4.0, "max_tokens": 30, "n": 3}
    events = server.request("POST", CHAT_PATH, request | {"stream": True}).events
    for choice in server.request("POST", CHAT_PATH, request).json["choices"]:
        parts = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
        assert "".join(text_of(part["delta"]) for part in parts) == text_of(choice["message"])
        assert [part["delta"]["role"] for part in parts if "role" in part["delta"]] == ["assistant"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]


def test_several_choices_compute_their_prompt_once_and_have_one_stream() -> None:
    fields: dict[str, Any] = {"n": 4, "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}}
    with stepped_server(num_slots=4, chunk_tokens=64) as server, server.running_stages():
        answer = receive_answer(server.send_chat(LONG_PROMPT, **fields))
        server.wait_for_requests(0)
    usage = answer.events[-1]["usage"]
    assert server.num_planned_tokens < 2 * usage["prompt_tokens"]
    assert usage["completion_tokens"] == 4 * 5
    assert answer.body.count(b"[DONE]") == 1


def test_a_hang_up_or_a_cancellation_ends_all_choices() -> None:
    with stepped_server(num_slots=4) as server:
        connection = server.send_chat(n=3, stream=True)
        server.wait_for_requests(3)
        assert len(server.request("GET", "/v1/status").json["requests"]) == 3
        connection.close()
        server.wait_for_requests(0)
        connection = server.send_chat(n=3)
        wait_until(lambda: len(server.state.records) == 3 and server.num_requests == 3, "three choices run")
        request_id = next(iter(server.state.records))
        assert server.request("POST", f"/v1/requests/{request_id}/cancel").status == 200
        assert len(receive_answer(connection).json["choices"]) == 3


def can_tokenize(server: SteppedServer) -> bool:
    return server.request("POST", "/tokenize", {"prompt": "a"}).status == 200


def test_requests_whose_bodies_are_not_complete_count_as_queued() -> None:
    """Slots and queue hold 3 requests: the fourth body is refused before it is read."""
    with stepped_server(num_slots=1, max_queued=2) as server, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(server.send("POST", CHAT_PATH, **{"Content-Length": "100"}))
        is_queued = True  # not a request for a count of tokens
        wait_until(lambda: server.state._num_preparing[is_queued] == 3, "three bodies are awaited")
        refused = server.request("POST", CHAT_PATH, REQUEST)
        assert (refused.status, refused.error["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        stack.close()
        wait_until(lambda: server.state._num_preparing[is_queued] == 0, "their clients are gone")
        assert can_tokenize(server)


def test_tokens_are_counted_while_the_queue_is_full() -> None:
    with stepped_server(num_slots=1, max_queued=1) as server:
        running = server.send_chat(stream=True)
        server.wait_for_plan()
        waiting = server.send_chat(stream=True)
        server.wait_for_requests(2)
        assert server.request("POST", CHAT_PATH, REQUEST).status == 429
        assert can_tokenize(server)
        running.close()
        waiting.close()
        server.wait_for_requests(0)


def test_warnings_become_one_header_of_harmless_characters() -> None:
    assert warning_headers([]) == {}
    header = warning_headers(['the "schema"\r\nset-cookie: a=b', "snö\x00w\\", "a" * 1000])["warning"]
    assert header.startswith('299 mlx-k2 "the ?schema???set-cookie: a=b", 299 mlx-k2 "sn??w?", 299 mlx-k2 "aaa')
    assert len(header) < 500
