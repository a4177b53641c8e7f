"""Tests of a request from its queue to its end: hang-ups, a full queue, keep-alives, restarts and slow clients."""

import contextlib
import json
import socket
import threading
from typing import Any

import pytest

from mlx_k2.server import sse
from mlx_k2.server.service import ServerOptions
from tests.server.in_process import SteppedServer, stepped_server, wait_until
from tests.server.served import WAIT_S, HttpAnswer, parsed

LONG_PROMPT = "one two three " * 60


def send_chat(server: SteppedServer, text: str = "a", **fields: Any) -> socket.socket:
    """Send a chat request and return its connection."""
    body = json.dumps({"messages": [{"role": "user", "content": text}], "seed": 3} | fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
    connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
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
    return parsed(received)


def run_in_thread(server: SteppedServer) -> threading.Event:
    """Execute plans until the returned event is set."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            if not sum(server.tokens.stages.execute(rank) for rank in range(2)):
                stop.wait(0.001)

    threading.Thread(target=run, daemon=True).start()
    return stop


def text_of(answer: bytes) -> str:
    """Return the text of a stream, whose chunked framing lies between events."""
    events = [line[6:] for line in answer.split(b"\n") if line.startswith(b"data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


@pytest.mark.parametrize("stream", [True, False])
def test_a_hang_up_in_the_queue_frees_its_place(stream: bool) -> None:
    with stepped_server(num_slots=1) as server:
        running = send_chat(server, stream=True)
        wait_until(lambda: server.num_used == 1, "the first request runs")
        waiting = send_chat(server, stream=stream)
        wait_until(lambda: server.num_used == 2, "the second request waits")
        waiting.close()
        wait_until(lambda: server.num_used == 1, "the second request is gone")
        running.close()
        wait_until(lambda: server.num_used == 0, "the first request is gone")


@pytest.mark.parametrize("stream", [True, False])
def test_a_hang_up_in_prefill_stops_the_prompt(stream: bool) -> None:
    with stepped_server() as server:
        connection = send_chat(server, LONG_PROMPT, stream=stream)
        wait_until(lambda: bool(server.tokens.plans), "the prompt begins")
        connection.close()
        wait_until(lambda: server.num_used == 0, "the request is gone")
        server.tokens.run(lambda: server.tokens.stages.next_step(1) is None)
        assert sum(len(row.token_ids) for step in server.tokens.plans for row in step.rows) < 100


@pytest.mark.parametrize("stream", [True, False])
def test_a_hang_up_in_decode_ends_the_answer(stream: bool) -> None:
    with stepped_server() as server:
        connection = send_chat(server, stream=stream)
        wait_until(lambda: bool(server.tokens.plans), "the prompt begins")
        server.tokens.run(lambda: len(server.tokens.plans) > 12)
        connection.close()
        wait_until(lambda: server.num_used == 0, "the request is gone")
        server.wait_for("/v1/chat/completions")


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
    ("kind", "mark"), [("comment", b": keep-alive\n\n"), ("chunk", b'"delta":{},"finish_reason":null')]
)
def test_a_stream_without_tokens_is_kept_alive_by_the_clock(kind: Any, mark: bytes) -> None:
    options = ServerOptions(keepalive=kind, keepalive_s=0.05)
    with stepped_server(options) as server, send_chat(server, stream=True) as connection:
        received = receive_until(connection, b'"role":"assistant"')
        assert mark in receive_until(connection, mark, received)


def test_headers_and_the_first_chunk_come_before_the_prompt_is_computed() -> None:
    with stepped_server() as server, send_chat(server, stream=True) as connection:
        received = receive_until(connection, b'"role":"assistant"')
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert b"text/event-stream" in received


def test_the_progress_of_the_prompt_is_sent_on_request() -> None:
    with stepped_server() as server:
        stop = run_in_thread(server)
        answer = answer_of(send_chat(server, LONG_PROMPT, stream=True, return_progress=True, max_tokens=3))
        stop.set()
        events = [json.loads(line[6:]) for line in answer.body.split(b"\n") if line.startswith(b"data: {")]
        progress = [event["prompt_progress"] for event in events if "prompt_progress" in event]
        assert progress
        assert all(0 < one["processed"] < one["total"] for one in progress)


def test_a_stream_goes_on_where_it_was_after_a_restart() -> None:
    fields = {"max_tokens": 40, "seed": 11}
    with stepped_server() as server:
        stop = run_in_thread(server)
        undisturbed = text_of(answer_of(send_chat(server, stream=True, **fields)).body)
        stop.set()
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
        stop = run_in_thread(server)
        answer = answer_of(connection, received)
        stop.set()
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


def test_a_client_that_takes_nothing_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "WRITE_S", 0.3)
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
    with stepped_server() as server:
        stop = run_in_thread(server)
        connection = send_chat(server, stream=True, max_tokens=30, seed=11)
        received = b""
        while part := connection.recv(64):
            received += part
        stop.set()
        assert b"[DONE]" in received
        connection.close()
