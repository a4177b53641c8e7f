"""Tests of faulty tool servers together with good ones: each fault is reported at once, and the others are used.

Each call logs its time (--log-cli-level=INFO) and must end within MAX_CALL_S, far below the time limits.
"""

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hypothesis
import mcp_types
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mcp.shared.message import SessionMessage
from pydantic import ValidationError

from mlx_k2.errors import ToolsError
from mlx_k2.tools.outcome import Outcome, ToolResult
from mlx_k2.tools.server_output import ServerOutput
from mlx_k2.tools.servers import HttpServer, Server, StdioServer
from mlx_k2.tools.toolbox import Limits, ToolBox, open_toolbox
from tests.advice import follows_advice

pytestmark = pytest.mark.timeout(90)
_LOG = logging.getLogger(__name__)
LIMITS = Limits(start_timeout_s=60.0, call_timeout_s=60.0)
MAX_CALL_S = 2.0 if hypothesis.settings.get_current_profile_name() == "long" else 20.0
SCRIPT = str(Path(__file__).with_name("faulty_server.py"))

FAULTS = {  # by the fault of a server's answer: the outcome of the call, and a part of the result's text
    "none": (Outcome.DONE, "fine"),
    "log lines": (Outcome.DONE, "fine"),
    "against its schema": (Outcome.DONE, "fine"),
    "byte order mark": (Outcome.DONE, "fine"),
    "headers": (
        Outcome.FAILED,
        "may have run: it writes headers before its messages; over stdio each message is a line",
    ),
    "another id": (Outcome.FAILED, "may have run: it answered the request 9"),
    "bad tools": (Outcome.DONE, "fine"),
    "not UTF-8": (Outcome.FAILED, "may have run: its answer cannot be read (byte 0xe9 is not UTF-8)"),
    "half a surrogate": (Outcome.FAILED, "may have run: its answer cannot be read (unexpected end of hex escape"),
    "control character": (Outcome.FAILED, "may have run: its answer cannot be read (control character"),
    "not JSON": (Outcome.FAILED, "may have run: its answer cannot be read (key must be a string"),
    "several lines": (Outcome.FAILED, "may have run: its answer cannot be read (trailing characters"),
    "cut": (Outcome.FAILED, "may have run: its answer cannot be read (EOF while parsing"),
    "no version": (Outcome.FAILED, "may have run: its answer cannot be read (not a JSON-RPC message)"),
    "error without an id": (Outcome.FAILED, "may have run: it sent an error without the id of a request: cannot parse"),
    "unknown content": (Outcome.FAILED, "The call was run, but the answer of the tool server"),
    "no content": (Outcome.FAILED, "cannot be read: content: Field required"),
    "internal error": (Outcome.FAILED, "may have run: the disk is full"),
    "dies": (Outcome.LOST, "was lost during this call, which may have run: it ended"),
    "closes stdout": (Outcome.LOST, "was lost during this call, which may have run: it ended"),
}


def call(box: ToolBox, name: str) -> ToolResult:
    """Return the result of a call; check that it ends within MAX_CALL_S."""
    began = time.monotonic()
    result = box.call(name, {})
    elapsed_s = time.monotonic() - began
    _LOG.info("%s: %.3f s, %s", name, elapsed_s, result.outcome.name)
    assert elapsed_s < MAX_CALL_S, result
    return result


def faulty(mode: str) -> StdioServer:
    return StdioServer(name=mode, command=sys.executable, args=("-I", SCRIPT, mode))


@pytest.fixture(scope="module")
def many() -> Iterator[ToolBox]:
    """Yield the tools of a server for each fault, and of two that have no tools or end at once."""
    ends = StdioServer(name="ends", command=sys.executable, args=("-c", "raise SystemExit('no key')"))
    absent = StdioServer(name="absent", command="/no/such/program")
    with open_toolbox([*map(faulty, FAULTS), faulty("no tools"), ends, absent], LIMITS) as box:
        yield box


@pytest.mark.parametrize("mode", FAULTS)
def test_a_call_with_a_faulty_answer_fails_at_once_with_the_reason(many: ToolBox, mode: str) -> None:
    outcome, text = FAULTS[mode]
    for _ in range(2):  # the second call is made over the same connection, or over a new one
        result = call(many, f"call_{mode.replace(' ', '_')}")
        assert result.outcome is outcome, result
        assert text in result.text


def test_servers_and_tools_that_cannot_be_used_are_named_and_the_others_are_used(many: ToolBox) -> None:
    assert many.problems == [
        "bad tools: a tool without a name is left out: {'name': 5}",
        "bad tools: its tool 'x' is left out: its inputSchema is not that of an object",
        "no tools: it has no tools",
        "ends: it ended; it wrote last: no key",
        "absent: [Errno 2] No such file or directory: '/no/such/program'",
    ]
    assert {"bare", "call_bad_tools"} < many.tools.keys()
    assert many.tools["bare"].parameters == {"type": "object"}


def test_servers_that_cannot_start_are_named_before_their_time_out_and_a_good_one_serves() -> None:
    ends = StdioServer(name="ends", command=sys.executable, args=("-c", "raise SystemExit('no key')"))
    began = time.monotonic()
    with open_toolbox([ends, StdioServer(name="absent", command="/no/such/program"), faulty("none")], LIMITS) as box:
        elapsed_s = time.monotonic() - began
        _LOG.info("%.3f s to start", elapsed_s)
        assert [problem.partition(":")[0] for problem in box.problems] == ["ends", "absent"]
        assert call(box, "call_none").text == "fine"
    assert elapsed_s < MAX_CALL_S


def test_after_an_unreadable_answer_the_same_process_serves_the_next_call() -> None:
    with open_toolbox([faulty("one call in two")], LIMITS) as box:
        outcomes = [call(box, "call_one_call_in_two").outcome for _ in range(4)]
    assert sorted(outcomes, key=str) == [Outcome.DONE, Outcome.DONE, Outcome.FAILED, Outcome.FAILED]
    assert outcomes[:2] == outcomes[2:]


HTTP_FAULTS = {  # by the path of a server with one fault: a part of the result's text
    "status-500": "may have run: HTTP 500 Internal Server Error",
    "status-401": "may have run: HTTP 401 Unauthorized: see its headers in the MCP file",
    "not-json": "may have run: Failed to parse JSON response",
    "not-utf-8": "may have run: Failed to parse JSON response",
    "html": "may have run: Unexpected content type: text/html",
    "accepted": "may have run: server answered a request with 202 Accepted",
    "error": "may have run: the disk is full",
    "empty-stream": "may have run: SSE stream ended without a response",
    "bad-stream": "may have run: Failed to parse SSE message",
    "hangs-up": "which may have run: ",
}


class _FaultyHttp(BaseHTTPRequestHandler):
    """A server whose path names the fault of its answers to calls."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(405, b"")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number, mode = request.get("id"), self.path[1:]
        result = {
            "initialize": {
                "protocolVersion": "2025-06-18",
                "capabilities": {},
                "serverInfo": {"name": "s", "version": "1"},
            },
            "tools/list": {"tools": [{"name": mode}]},
            "tools/call": {"content": [{"type": "text", "text": "fine"}]},
        }.get(request["method"])
        good = json.dumps({"jsonrpc": "2.0", "id": number, "result": result}).encode()
        if number is None:
            self._send(202, b"")
        elif request["method"] != "tools/call":
            self._send(200, good)
        else:
            self._send_faulty(mode, good)

    def _send_faulty(self, mode: str, good: bytes) -> None:
        match mode:
            case "not-json":
                self._send(200, b"<html>")
            case "not-utf-8":
                self._send(200, good.replace(b"fine", b"\xe9"))
            case "html":
                self._send(200, b"<html>", "text/html")
            case "error":  # after a 405 for the stream that the client asked for
                error = {"code": -32603, "message": "the disk is full"}
                self._send(200, json.dumps({"jsonrpc": "2.0", "id": json.loads(good)["id"], "error": error}).encode())
            case "accepted":
                self._send(202, b"")
            case "empty-stream":
                self._send(200, b"", "text/event-stream")
            case "bad-stream":
                self._send(200, b"event: message\ndata: {'jsonrpc'}\n\n", "text/event-stream")
            case "hangs-up":
                self.close_connection = True
            case "good":
                self._send(200, good)
            case _:
                self._send(int(mode.removeprefix("status-")), b"")

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def faulty_http() -> Iterator[str]:
    """Yield the URL of a server of _FaultyHttp, which ends with this context."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _FaultyHttp)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_http_servers_with_one_fault_each_fail_at_once_and_a_good_one_is_used() -> None:
    with faulty_http() as url:
        servers: list[Server] = [HttpServer(name=mode, url=f"{url}/{mode}") for mode in (*HTTP_FAULTS, "good")]
        unreachable = HttpServer(name="unreachable", url="http://127.0.0.1:9/mcp")
        with open_toolbox([*servers, unreachable], LIMITS) as box:
            assert box.problems == ["unreachable: All connection attempts failed"]
            results = {mode: call(box, mode) for mode in (*HTTP_FAULTS, "good")}
    assert results.pop("good").text == "fine"
    for mode, text in HTTP_FAULTS.items():
        assert text in results[mode].text, mode
        assert results[mode].outcome in (Outcome.FAILED, Outcome.LOST)


@follows_advice(
    "HTTP 401 Unauthorized: see its headers in the MCP file",
)
@pytest.mark.parametrize(
    "status", ["401 Unauthorized: see its headers", "403 Forbidden", "404 Not Found", "503 Service"]
)
def test_a_server_that_refuses_the_start_is_named_with_its_http_status(status: str) -> None:
    class Refusing(_FaultyHttp):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._send(int(status[:3]), b"")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    web = HttpServer(name="web", url=f"http://127.0.0.1:{server.server_port}/")
    with pytest.raises(ToolsError, match=f"no tool server starts: web: HTTP {status}"), open_toolbox([web], LIMITS):
        pass
    server.shutdown()
    server.server_close()


def inspect(output: ServerOutput, line: bytes) -> list[mcp_types.JSONRPCMessage]:
    """Return the messages that mcp's client gets for a line of a server's stdout."""
    try:
        parsed = mcp_types.jsonrpc_message_adapter.validate_json(line.decode(errors="surrogateescape"), by_name=False)
    except ValidationError as error:
        return [message.message for message in output.inspect(error)]
    return [message.message for message in output.inspect(SessionMessage(parsed))]


@given(text=st.binary(max_size=20), number=st.integers(0, 9), others=st.sets(st.integers(0, 9)), end=st.integers(0, 12))
@example(text=b'", "id": 5, "x": "', number=3, others={5}, end=0)
@example(text=b"\\ud83d", number=3, others=set(), end=0)
def test_the_answer_to_a_request_is_never_dropped_whatever_bytes_are_in_it(
    text: bytes, number: int, others: set[int], end: int
) -> None:
    output = ServerOutput()
    for pending in {number} | others:
        request = mcp_types.JSONRPCRequest(jsonrpc="2.0", id=pending, method="tools/call")
        output.record_sent(SessionMessage(request))
    full = b'{"jsonrpc": "2.0", "id": %d, "result": {"content": [{"type": "text", "text": "%s"}]}}' % (number, text)
    answers = inspect(output, full[: len(full) - end])
    ids = [answer.id for answer in answers if isinstance(answer, mcp_types.JSONRPCResponse | mcp_types.JSONRPCError)]
    assert len(ids) == len(answers)
    if b'"id"' not in text:
        assert ids == [number]
    assert number in ids or isinstance(answers[0], mcp_types.JSONRPCResponse)


@given(st.text().filter(lambda line: "jsonrpc" not in line and '"id"' not in line and "'id'" not in line))
@example("[2026-01-01 12:00] INFO listening")
@example("{ name: 'x' }")
@example("content-length:")
def test_a_line_of_a_log_does_not_end_the_connection(line: str) -> None:
    output = ServerOutput()
    output.record_sent(SessionMessage(mcp_types.JSONRPCRequest(jsonrpc="2.0", id=1, method="tools/call")))
    assert inspect(output, line.encode(errors="replace")) == []
