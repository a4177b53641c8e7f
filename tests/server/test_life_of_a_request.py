"""Tests of a request from the queue to its end: closed connections, a full queue, keep-alives, restarts, slow clients.

The prompt of the text "a", the default, has 24 tokens. In default chunks of 8 tokens its prefill is the first 3 plans;
all later plans are decode.
"""

import contextlib
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.server import http_connection, request_fields
from mlx_k2.server.api_keys import KeyRing, add_key
from mlx_k2.server.chat_reply import ChatReply
from mlx_k2.server.server_state import ServerOptions
from tests.server.http_client import CHAT_PATH, WAIT_S, HttpAnswer, receive_answer, receive_until, request_bytes
from tests.server.in_process import ALLOWED_ORIGIN, LONG_PROMPT, SteppedServer, stepped_server, wait_until

FIRST_CHUNK = b'"role":"assistant"'
with_and_without_stream = pytest.mark.parametrize("stream", [True, False])
# With None the request has "Connection: close". The bytes follow a request that keeps its connection.
on_each_kind_of_connection = pytest.mark.parametrize("pipelined", [None, b"", b"\r\n", request_bytes("GET", "/health")])


def connect_with_small_buffer(server: SteppedServer) -> socket.socket:
    """Return a connection whose receive buffer is so small that the server waits for the client."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.settimeout(WAIT_S)
    connection.connect(("127.0.0.1", server.port))
    return connection


def content_of(answer: HttpAnswer) -> str:
    """Return the content of the choices in a stream."""
    choices = [choice for event in answer.events for choice in event["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


@pytest.mark.slow
@with_and_without_stream
@on_each_kind_of_connection
def test_a_hang_up_in_the_queue_ends_the_request(stream: bool, pipelined: bytes | None) -> None:
    with stepped_server(num_slots=1) as server:
        running = server.send_chat(stream=True)
        server.wait_for_requests(1)
        waiting = server.send_chat(pipelined=pipelined, stream=stream)
        server.wait_for_requests(2)
        waiting.close()
        server.wait_for_requests(1)
        running.close()
        server.wait_for_requests(0)


@pytest.mark.slow
@with_and_without_stream
@on_each_kind_of_connection
def test_a_hang_up_in_prefill_stops_the_prompt(stream: bool, pipelined: bytes | None) -> None:
    with stepped_server() as server:
        connection = server.send_chat(LONG_PROMPT, pipelined=pipelined, stream=stream)
        server.wait_for_plan()
        connection.close()
        server.wait_for_requests(0)
        server.run_all_plans()
        assert server.num_planned_tokens < 100, "too many of the prompt's 324 tokens were planned"


@pytest.mark.slow
@with_and_without_stream
@on_each_kind_of_connection
def test_a_hang_up_in_decode_ends_the_answer(stream: bool, pipelined: bytes | None) -> None:
    with stepped_server() as server:
        connection = server.send_chat(pipelined=pipelined, stream=stream)
        server.wait_for_plan()
        server.run_plans(12)
        connection.close()
        server.wait_for_requests(0)
        server.wait_for_line("/v1/chat/completions")  # the request is in the log


def test_bytes_after_a_request_with_connection_close_are_ignored() -> None:
    with stepped_server() as server, server.send_chat(max_tokens=3) as connection:
        server.wait_for_requests(1)
        connection.sendall(b"\r\n")
        with server.running_stages():
            assert receive_answer(connection).status == 200


def test_more_than_64_kib_after_a_request_end_the_connection_and_the_request() -> None:
    with stepped_server() as server, server.send_chat(pipelined=b"", stream=True) as connection:
        server.wait_for_requests(1)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(100):
                connection.sendall(b"GET /health HTTP/1.1\r\n" * 100)
        server.wait_for_requests(0)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_after_a_hang_up_the_next_plan_is_for_the_request_that_waited(phase: str) -> None:
    with stepped_server(num_slots=1, chunk_tokens=32) as server:
        running = server.send_chat(LONG_PROMPT if phase == "prefill" else "a", stream=True)
        server.wait_for_plan()
        if phase == "decode":
            server.run_plans(12)
        waiting = server.send_chat("four five six " * 60, stream=True)
        server.wait_for_requests(2)
        num_plans = len(server.harness.plans)
        running.close()
        server.wait_for_requests(1)
        with server.running_stages():
            wait_until(lambda: len(server.harness.plans) > num_plans, "the next plan is sent")
        (row,) = server.harness.plans[num_plans].rows
        assert row.position < 32, "the plan is not for the first chunk of the second prompt"
        assert len(row.token_ids) > 1, "the plan is for a token of the first answer"
        waiting.close()
        server.wait_for_requests(0)


def test_a_client_that_reads_slowly_does_not_keep_its_slot() -> None:
    """The client reads 50 bytes a second of an answer of more than 200 kB: the engine does not wait for it."""
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 900}
    pause = threading.Event()
    with (
        stepped_server(num_slots=1) as server,
        server.running_stages(),
        connect_with_small_buffer(server) as connection,
    ):
        connection.sendall(request_bytes("POST", CHAT_PATH, body))
        assert connection.recv(1)
        for _ in range(int(50 * WAIT_S)):
            assert connection.recv(1)
            pause.wait(0.02)
            if server.num_requests == 0:
                break
        assert server.num_requests == 0
        assert receive_answer(server.send_chat(max_tokens=1)).status == 200


def test_a_full_queue_is_a_429_with_the_time_to_wait() -> None:
    with stepped_server(num_slots=1, max_queued=1) as server:
        first = server.send_chat(stream=True)
        server.wait_for_plan()
        second = server.send_chat(stream=True)
        server.wait_for_requests(2)
        answer = receive_answer(server.send_chat())
        assert answer.status == 429
        assert answer.error["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        assert "token" not in answer.error["message"]  # agents shorten their history after an error about tokens
        first.close()
        second.close()
        server.wait_for_requests(0)


@pytest.mark.parametrize(
    ("kind", "keepalive"), [("comment", b": keep-alive\n\n"), ("chunk", b'"delta":{},"finish_reason":null')]
)
def test_a_stream_is_kept_alive_while_it_has_no_tokens(kind: Any, keepalive: bytes) -> None:
    options = ServerOptions(keepalive=kind, keepalive_s=0.05)
    with stepped_server(options) as server, server.send_chat(stream=True) as connection:
        receive_until(connection, keepalive)


def test_headers_and_the_first_chunk_come_before_the_prompt_is_computed() -> None:
    with stepped_server() as server, server.send_chat(stream=True) as connection:
        received_bytes = receive_until(connection, FIRST_CHUNK)
        assert received_bytes.startswith(b"HTTP/1.1 200 OK")
        assert b"text/event-stream" in received_bytes


def test_the_progress_of_the_prompt_is_sent_on_request() -> None:
    with stepped_server() as server, server.running_stages():
        answer = receive_answer(server.send_chat(LONG_PROMPT, stream=True, return_progress=True, max_tokens=3))
    progress = [event["prompt_progress"] for event in answer.events if "prompt_progress" in event]
    assert progress
    assert all(0 <= report["processed"] < report["total"] for report in progress)


def test_a_stream_continues_without_a_gap_after_a_restart() -> None:
    fields: dict[str, Any] = {"max_tokens": 40, "seed": 11}
    with stepped_server() as server, server.running_stages():
        undisturbed = content_of(receive_answer(server.send_chat(stream=True, **fields)))
    assert undisturbed
    with stepped_server(ServerOptions(keepalive_s=0.05)) as server:
        connection = server.send_chat(stream=True, **fields)
        server.wait_for_plan()
        server.run_plans(8)
        server.harness.fail_stage(rank=1)
        refused = receive_answer(server.send_chat())
        assert (refused.status, refused.error["code"]) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) > 0
        received_bytes = receive_until(connection, b": keep-alive")
        server.harness.end_restart()
        with server.running_stages():
            answer = receive_answer(connection, received_bytes)
        assert content_of(answer) == undisturbed
        assert answer.body.count(b"[DONE]") == 1


def test_the_end_of_the_engine_is_an_error_event_of_the_stream() -> None:
    with stepped_server() as server:
        connection = server.send_chat(stream=True)
        received_bytes = receive_until(connection, FIRST_CHUNK)
        server.wait_for_plan()
        server.harness.fail_stage(rank=0)
        server.harness.cancel()  # the restart
        answer = receive_answer(connection, received_bytes)
        assert answer.events[-1]["error"]["code"] == "unavailable"
        assert answer.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_an_unexpected_error_in_a_stream_is_sent_without_its_text(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError("a secret prompt")

    monkeypatch.setattr(ChatReply, "add", fail)
    messages = [{"role": "user", "content": "a"}]
    # "input" is the field of the Responses API for messages; each API ignores the other's field
    body = {"messages": messages, "input": messages, "max_tokens": 3, "stream": True}
    with stepped_server() as server, server.running_stages():
        answer = receive_answer(server.send("POST", path, body))
        assert answer.status == 200
        assert b"unexpected error in the server" in answer.body
        server.wait_for_line("LookupError")
        assert "secret" not in answer.body.decode() + "\n".join(server.lines)


def test_a_client_that_reads_nothing_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "WRITE_TIMEOUT_S", 0.3)
    options = ServerOptions(keepalive="chunk", keepalive_s=0.0001)  # so often that keep-alives fill the buffers
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True}
    with stepped_server(options) as server, connect_with_small_buffer(server) as connection:
        connection.sendall(request_bytes("POST", CHAT_PATH, body))
        server.wait_for_plan()
        server.wait_for_requests(0)
        received_bytes = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1 << 20):
                received_bytes += part
        assert b"[DONE]" not in received_bytes


def test_a_client_that_reads_small_parts_gets_its_whole_answer() -> None:
    with stepped_server() as server, server.running_stages():
        connection = server.send_chat(stream=True, max_tokens=30, seed=11)
        received_bytes = b""
        while part := connection.recv(64):
            received_bytes += part
        assert b"[DONE]" in received_bytes
        connection.close()


def test_a_request_is_cancelled_by_its_own_key_and_unknown_to_others(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    alice, bob = add_key(path, "alice"), add_key(path, "bob")
    with stepped_server(keys=KeyRing(path, is_required=True)) as server:
        connection = server.send_chat(key=alice, stream=True)
        received_bytes = receive_until(connection, FIRST_CHUNK)
        request_id = received_bytes.split(b'"id":"')[1].split(b'"')[0].decode()
        cancel = f"/v1/requests/{request_id}/cancel"
        for key, cancel_path in ((bob, cancel), (alice, "/v1/requests/nothing/cancel")):
            answer = server.request("POST", cancel_path, **{"x-api-key": key})
            assert (answer.status, answer.error["code"]) == (404, "request_not_found")
        for key, visible_id in ((alice, request_id.removeprefix("chatcmpl-")), (bob, None)):
            status = server.request("GET", "/v1/status", **{"x-api-key": key}).json
            assert [entry["id"] for entry in status["requests"]] == [visible_id]
        cancelled = server.request("POST", cancel, **{"x-api-key": alice}).json
        assert cancelled == {"id": request_id, "cancelled": True}
        answer = receive_answer(connection, received_bytes)
        assert b'"finish_reason":"stop"' in answer.body
        assert answer.body.count(b"[DONE]") == 1
        server.wait_for_requests(0)


def test_an_allowed_origin_gets_its_headers_and_another_does_not() -> None:
    with stepped_server() as server:
        headers = {"Access-Control-Request-Headers": "x-stainless-os, authorization"}
        allowed = server.request("OPTIONS", "/v1/models", Origin=ALLOWED_ORIGIN, **headers)
        refused = server.request("OPTIONS", "/v1/models", Origin="https://evil.example", **headers)
    assert (allowed.status, refused.status) == (204, 403)
    assert allowed.headers["access-control-allow-origin"] == ALLOWED_ORIGIN
    assert allowed.headers["access-control-allow-headers"] == "x-stainless-os, authorization"
    assert not [name for name in refused.headers if name.startswith("access-control-allow")]


def test_a_connection_without_a_whole_request_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "HEADERS_TIMEOUT_S", 0.2)
    monkeypatch.setattr(request_fields, "BODY_TIMEOUT_S", 0.2)
    with stepped_server() as server:
        for beginning in (b"", b"POST /v1/chat"):
            with server.connect() as connection:
                connection.sendall(beginning)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(100) == b""
        with server.connect() as connection:
            connection.sendall(request_bytes("POST", CHAT_PATH, b'{"messages"', **{"Content-Length": "100"}))
            answer = receive_answer(connection)
            assert (answer.status, answer.error["code"]) == (408, "request_timeout")


def test_a_second_request_on_a_connection_has_its_own_limit_for_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "HEADERS_TIMEOUT_S", 0.2)
    with stepped_server() as server, server.connect() as connection:
        for _ in range(2):
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert receive_until(connection, b"]}").startswith(b"HTTP/1.1 200")
            threading.Event().wait(0.4)  # longer than the limit, which begins at the first byte of the next request
        connection.sendall(b"GET /v1")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""


def test_a_head_request_for_the_status_stream_ends() -> None:
    with stepped_server() as server:
        answer = server.request("HEAD", "/v1/status/events")
        assert (answer.status, answer.body) == (200, b"")
        assert answer.headers["content-type"].startswith("text/event-stream")


def test_a_prompt_of_one_chunk_has_a_prefill_phase_and_a_time_in_the_queue() -> None:
    with stepped_server(num_slots=1, chunk_tokens=64) as server:
        first = server.send_chat(max_tokens=1)
        server.wait_for_plan()
        second = server.send_chat(max_tokens=1)
        server.wait_for_requests(2)
        phases = [entry["phase"] for entry in server.request("GET", "/v1/status").json["requests"]]
        assert phases == ["prefill", "queued"]
        threading.Event().wait(0.5)
        with server.running_stages():
            for connection in (first, second):
                assert receive_answer(connection).status == 200
        metrics = server.request("GET", "/metrics").body.decode()
        values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
        assert float(values["mlx_k2_request_queue_time_seconds_sum"]) > 0.4
        assert float(values["mlx_k2_request_prefill_time_seconds_sum"]) > 0.4
        assert float(values["mlx_k2_request_queue_time_seconds_count"]) == 2


def test_each_change_of_the_status_is_streamed_with_the_next_id() -> None:
    with stepped_server() as server:
        connection = server.send("GET", "/v1/status/events")
        received_bytes = receive_until(connection, b"event: status")
        assert b"id: 1\n" in received_bytes
        running = server.send_chat(stream=True)
        received_bytes = receive_until(connection, b'"phase":"', received_bytes)
        receive_until(connection, b"id: 3\n", received_bytes)
        running.close()
        connection.close()
        with server.send("GET", "/v1/status/events", **{"Last-Event-ID": "41"}) as reconnected:
            assert b"id: 42\n" in receive_until(reconnected, b"event: status")
        server.wait_for_line("GET /v1/status/events", 2)
