"""Tests of a request from its queue to its end: hang-ups, a full queue, keep-alives, restarts and slow clients."""

import contextlib
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.server import http_connection, request_fields
from mlx_k2.server.api_keys import KeyRing, add_key
from mlx_k2.server.chat_reply import ChatReply
from mlx_k2.server.server_state import ServerOptions
from tests.server.in_process import SteppedServer, stepped_server, stepping, wait_until
from tests.server.server_process import WAIT_S, HttpAnswer, parse_answer

LONG_PROMPT = "one two three " * 60


def send_chat(
    server: SteppedServer, text: str = "a", key: str = "", after: bytes | None = None, **fields: Any
) -> socket.socket:
    """Send a chat request and return its connection."""
    body = {"messages": [{"role": "user", "content": text}], "seed": 3} | fields
    return send(server, "POST", "/v1/chat/completions", body, key, after)


def send(
    server: SteppedServer, method: str, path: str, body: object, key: str = "", after: bytes | None = None
) -> socket.socket:
    """Send a request and return its connection. ``after``: bytes that follow the request on an open connection."""
    data = json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\nx-api-key: {key}\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
    connection.sendall(head.encode() + (b"Connection: close\r\n\r\n" if after is None else b"\r\n") + data)
    connection.sendall(after or b"")
    return connection


def receive_until(connection: socket.socket, text: bytes, received: bytes = b"") -> bytes:
    while text not in received:
        part = connection.recv(65536)
        assert part, f"the answer ended without {text!r}: {received!r}"
        received += part
    return received


def answer_of(connection: socket.socket, received: bytes = b"") -> HttpAnswer:
    while part := connection.recv(65536):
        received += part
    connection.close()
    return parse_answer(received)


def text_of(answer: bytes) -> str:
    """Return the text of a stream, whose chunked framing lies between events."""
    events = [line[6:] for line in answer.split(b"\n") if line.startswith(b"data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


STREAMED = pytest.mark.parametrize("stream", [True, False])
AFTER = pytest.mark.parametrize("after", [None, b"", b"\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])


@pytest.mark.slow
@STREAMED
@AFTER
def test_a_hang_up_in_the_queue_ends_the_request(stream: bool, after: bytes | None) -> None:
    with stepped_server(num_slots=1) as server:
        running = send_chat(server, stream=True)
        wait_until(lambda: server.num_used == 1, "the first request runs")
        waiting = send_chat(server, after=after, stream=stream)
        wait_until(lambda: server.num_used == 2, "the second request waits")
        waiting.close()
        wait_until(lambda: server.num_used == 1, "the second request is gone")
        running.close()
        wait_until(lambda: server.num_used == 0, "the first request is gone")


@pytest.mark.slow
@STREAMED
@AFTER
def test_a_hang_up_in_prefill_stops_the_prompt(stream: bool, after: bytes | None) -> None:
    with stepped_server() as server:
        connection = send_chat(server, LONG_PROMPT, after=after, stream=stream)
        wait_until(lambda: bool(server.tokens.plans), "the prompt begins")
        connection.close()
        wait_until(lambda: server.num_used == 0, "the request is gone")
        server.tokens.run(lambda: server.tokens.stages.next_step(1) is None)
        assert sum(len(row.token_ids) for step in server.tokens.plans for row in step.rows) < 100


@pytest.mark.slow
@STREAMED
@AFTER
def test_a_hang_up_in_decode_ends_the_answer(stream: bool, after: bytes | None) -> None:
    with stepped_server() as server:
        connection = send_chat(server, after=after, stream=stream)
        wait_until(lambda: bool(server.tokens.plans), "the prompt begins")
        server.tokens.run(lambda: len(server.tokens.plans) > 12)
        connection.close()
        wait_until(lambda: server.num_used == 0, "the request is gone")
        server.wait_for("/v1/chat/completions")


def test_what_follows_a_request_that_closes_its_connection_is_ignored() -> None:
    with stepped_server() as server, send_chat(server, max_tokens=3) as connection:
        wait_until(lambda: server.num_used == 1, "the request runs")
        connection.sendall(b"\r\n")
        with stepping(server):
            assert answer_of(connection).status == 200


def test_more_than_64_kib_behind_a_request_ends_the_connection_and_the_request() -> None:
    with stepped_server() as server, send_chat(server, after=b"", stream=True) as connection:
        wait_until(lambda: server.num_used == 1, "the request runs")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(100):
                connection.sendall(b"GET /health HTTP/1.1\r\n" * 100)
        wait_until(lambda: server.num_used == 0, "the request is gone")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_hang_up_frees_the_slot_for_the_next_plan(phase: str) -> None:
    with stepped_server(num_slots=1, chunk_tokens=32) as server:
        running = send_chat(server, LONG_PROMPT if phase == "prefill" else "a", stream=True)
        wait_until(lambda: bool(server.tokens.plans), "the first request runs")
        if phase == "decode":
            server.tokens.run(lambda: len(server.tokens.plans) > 12)
        waiting = send_chat(server, "four five six " * 60, stream=True)
        wait_until(lambda: server.num_used == 2, "the second request waits")
        num_plans = len(server.tokens.plans)
        running.close()
        wait_until(lambda: server.num_used == 1, "the first request is gone")
        with stepping(server):
            wait_until(lambda: len(server.tokens.plans) > num_plans, "the next plan is sent")
        (row,) = server.tokens.plans[num_plans].rows
        assert (row.position, len(row.token_ids)) < (32, 33), "the beginning of the second prompt"
        assert len(row.token_ids) > 1, "no token of the first answer"
        waiting.close()
        wait_until(lambda: server.num_used == 0, "both are gone")


def test_a_client_that_reads_byte_by_byte_holds_no_slot() -> None:
    """The client takes 50 bytes a second of an answer of more than 200 kB: the engine does not wait for it."""
    with stepped_server(num_slots=1) as server, stepping(server):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.settimeout(WAIT_S)
        connection.connect(("127.0.0.1", server.port))
        body = json.dumps({"messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 900}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        pause = threading.Event()
        assert connection.recv(1)
        for _ in range(int(50 * WAIT_S)):
            assert connection.recv(1)
            pause.wait(0.02)
            if server.num_used == 0:
                break
        assert server.num_used == 0
        assert answer_of(send_chat(server, max_tokens=1)).status == 200
        connection.close()


def test_a_full_queue_is_a_429_with_the_time_to_wait() -> None:
    with stepped_server(num_slots=1, max_queued=1) as server:
        first = send_chat(server, stream=True)
        wait_until(lambda: bool(server.tokens.plans), "the first request runs")
        second = send_chat(server, stream=True)
        wait_until(lambda: server.num_used == 2, "the second request waits")
        answer = answer_of(send_chat(server))
        assert answer.status == 429
        assert answer.error["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        assert "token" not in answer.error["message"]  # agents would drop history
        first.close()
        second.close()
        wait_until(lambda: server.num_used == 0, "both are gone")


@pytest.mark.parametrize(
    ("kind", "keepalive"), [("comment", b": keep-alive\n\n"), ("chunk", b'"delta":{},"finish_reason":null')]
)
def test_a_stream_without_tokens_is_kept_alive_by_the_clock(kind: Any, keepalive: bytes) -> None:
    options = ServerOptions(keepalive=kind, keepalive_s=0.05)
    with stepped_server(options) as server, send_chat(server, stream=True) as connection:
        received = receive_until(connection, b'"role":"assistant"')
        assert keepalive in receive_until(connection, keepalive, received)


def test_headers_and_the_first_chunk_come_before_the_prompt_is_computed() -> None:
    with stepped_server() as server, send_chat(server, stream=True) as connection:
        received = receive_until(connection, b'"role":"assistant"')
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert b"text/event-stream" in received


def test_the_progress_of_the_prompt_is_sent_on_request() -> None:
    with stepped_server() as server:
        with stepping(server):
            answer = answer_of(send_chat(server, LONG_PROMPT, stream=True, return_progress=True, max_tokens=3))
        events = [json.loads(line[6:]) for line in answer.body.split(b"\n") if line.startswith(b"data: {")]
        progress = [event["prompt_progress"] for event in events if "prompt_progress" in event]
        assert progress
        assert all(0 <= entry["processed"] < entry["total"] for entry in progress)


def test_a_stream_has_the_same_text_after_a_restart() -> None:
    fields: dict[str, Any] = {"max_tokens": 40, "seed": 11}
    with stepped_server() as server, stepping(server):
        undisturbed = text_of(answer_of(send_chat(server, stream=True, **fields)).body)
    assert undisturbed
    with stepped_server(ServerOptions(keepalive_s=0.05)) as server:
        connection = send_chat(server, stream=True, **fields)
        wait_until(lambda: bool(server.tokens.plans), "the prompt begins")
        num_plans = len(server.tokens.plans)
        server.tokens.run(lambda: len(server.tokens.plans) > num_plans + 6)
        server.tokens.fail(1)
        refused = answer_of(send_chat(server))
        assert (refused.status, refused.error["code"]) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) > 0
        received = receive_until(connection, b": keep-alive")
        server.tokens.end_restart()
        with stepping(server):
            answer = answer_of(connection, received)
        assert text_of(answer.body) == undisturbed
        assert answer.body.count(b"[DONE]") == 1


def test_the_end_of_the_engine_is_an_error_event_of_the_stream() -> None:
    with stepped_server() as server:
        connection = send_chat(server, stream=True)
        received = receive_until(connection, b'"role":"assistant"')
        wait_until(lambda: bool(server.tokens.plans), "the prompt begins")
        server.tokens.fail(0)
        server.tokens.cancel()
        answer = answer_of(connection, received)
        (error,) = [json.loads(line[6:])["error"] for line in answer.body.split(b"\n") if b'"error"' in line]
        assert error["code"] == "unavailable"
        assert answer.body.rstrip(b"\r\n0").endswith(b"data: [DONE]")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_an_unexpected_error_in_a_stream_is_its_last_event(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError("a secret prompt")

    monkeypatch.setattr(ChatReply, "add", fail)
    user = [{"role": "user", "content": "a"}]
    body = {"messages": user, "input": user, "max_tokens": 3, "stream": True}
    with stepped_server() as server, stepping(server):
        answer = answer_of(send(server, "POST", path, body))
        assert answer.status == 200
        assert b"unexpected error in the server" in answer.body
        assert answer.body.endswith(b"0\r\n\r\n"), "the end of the chunked body"
        server.wait_for("LookupError")
        assert "secret" not in answer.body.decode() + "\n".join(server.lines)


def test_a_client_that_reads_nothing_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "WRITE_TIMEOUT_S", 0.3)
    with stepped_server(ServerOptions(keepalive="chunk", keepalive_s=0.0001)) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", server.port))
        body = json.dumps({"messages": [{"role": "user", "content": "a"}], "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: bool(server.tokens.plans), "the request runs")
        wait_until(lambda: server.num_used == 0, "the request is gone")
        connection.settimeout(WAIT_S)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1 << 20):
                received += part
        connection.close()
        assert b"[DONE]" not in received


def test_a_client_that_reads_slowly_keeps_its_answer() -> None:
    with stepped_server() as server, stepping(server):
        connection = send_chat(server, stream=True, max_tokens=30, seed=11)
        received = b""
        while part := connection.recv(64):
            received += part
        assert b"[DONE]" in received
        connection.close()


def test_a_request_is_cancelled_by_its_own_key_and_unknown_to_others(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    alice, bob = add_key(path, "alice"), add_key(path, "bob")
    with stepped_server(keys=KeyRing(path, is_required=True)) as server:
        connection = send_chat(server, key=alice, stream=True)
        received = receive_until(connection, b'"role":"assistant"')
        request_id = received.split(b'"id":"')[1].split(b'"')[0].decode()
        cancel = f"/v1/requests/{request_id}/cancel"
        for key, where in ((bob, cancel), (alice, "/v1/requests/nothing/cancel")):
            answer = answer_of(send(server, "POST", where, {}, key))
            assert (answer.status, answer.error["code"]) == (404, "request_not_found")
        for key, visible_id in ((alice, request_id.removeprefix("chatcmpl-")), (bob, None)):
            status = answer_of(send(server, "GET", "/v1/status", {}, key)).json
            assert [entry["id"] for entry in status["requests"]] == [visible_id]
        assert answer_of(send(server, "POST", cancel, {}, alice)).json == {"id": request_id, "cancelled": True}
        answer = answer_of(connection, received)
        assert b'"finish_reason":"stop"' in answer.body
        assert answer.body.count(b"[DONE]") == 1
        wait_until(lambda: server.num_used == 0, "the request is gone")


def test_an_allowed_origin_gets_its_headers_and_another_does_not() -> None:
    with stepped_server() as server:
        for origin, status in (("https://chat.example", 204), ("https://evil.example", 403)):
            names = "Access-Control-Request-Headers: x-stainless-os, authorization"
            lines = ("OPTIONS /v1/models HTTP/1.1", "Host: localhost", f"Origin: {origin}", names, "Connection: close")
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            answer = answer_of(connection)
            assert answer.status == status
            assert answer.headers.get("access-control-allow-origin") == (origin if status == 204 else None)
            allowed = "x-stainless-os, authorization" if status == 204 else None
            assert answer.headers.get("access-control-allow-headers") == allowed


def test_half_a_request_and_then_silence_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "HEADERS_TIMEOUT_S", 0.2)
    monkeypatch.setattr(request_fields, "BODY_TIMEOUT_S", 0.2)
    with stepped_server() as server:
        for beginning in (b"", b"POST /v1/chat"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
                connection.sendall(beginning)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(100) == b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
            connection.sendall(head + b'{"messages"')
            answer = answer_of(connection)
            assert (answer.status, answer.error["code"]) == (408, "request_timeout")


def test_a_second_request_on_a_connection_has_its_own_limit_for_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "HEADERS_TIMEOUT_S", 0.2)
    with stepped_server() as server, socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        for _ in range(2):
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert receive_until(connection, b"]}").startswith(b"HTTP/1.1 200")
            threading.Event().wait(0.4)
        connection.sendall(b"GET /v1")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""


def test_a_head_request_for_the_status_stream_has_no_body() -> None:
    with stepped_server() as server:
        answer = server.request("HEAD", "/v1/status/events")
        assert (answer.status, answer.body) == (200, b"")
        assert answer.headers["content-type"].startswith("text/event-stream")


def test_a_prompt_of_one_chunk_has_a_prefill_phase_and_a_time_in_the_queue() -> None:
    with stepped_server(num_slots=1, chunk_tokens=64) as server:
        first = send_chat(server, max_tokens=1)
        wait_until(lambda: bool(server.tokens.plans), "the first request runs")
        second = send_chat(server, max_tokens=1)
        wait_until(lambda: server.num_used == 2, "the second request waits")
        phases = [entry["phase"] for entry in server.request("GET", "/v1/status").json["requests"]]
        assert phases == ["prefill", "queued"]
        threading.Event().wait(0.5)
        with stepping(server):
            for connection in (first, second):
                assert answer_of(connection).status == 200
        metrics = server.request("GET", "/metrics").body.decode()
        values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
        assert float(values["mlx_k2_request_queue_time_seconds_sum"]) > 0.4
        assert float(values["mlx_k2_request_prefill_time_seconds_sum"]) > 0.4
        assert float(values["mlx_k2_request_queue_time_seconds_count"]) == 2


def test_the_status_is_streamed_when_it_changes_with_consecutive_ids() -> None:
    with stepped_server() as server:
        connection = send(server, "GET", "/v1/status/events", {})
        received = receive_until(connection, b"event: status")
        assert b"id: 1\n" in received
        running = send_chat(server, stream=True)
        received = receive_until(connection, b'"phase":"', received)
        received = receive_until(connection, b"id: 3\n", received)
        running.close()
        connection.close()
        head = b"GET /v1/status/events HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: 41\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as again:
            again.sendall(head)
            assert b"id: 42\n" in receive_until(again, b"event: status")
        server.wait_for("GET /v1/status/events", 2)
