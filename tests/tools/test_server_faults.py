"""Tests of faulty tool servers together with good ones: each fault is named at once, and the good ones are used.

Each call logs its duration (--log-cli-level=INFO): far below the timeouts, and below 2 s in the long profile.
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
ENDED_SERVER = StdioServer(name="ends", command=sys.executable, args=("-c", "raise SystemExit('no key')"))
ABSENT_SERVER = StdioServer(name="absent", command="/no/such/program")

RESULTS = {  # by the fault of `faulty_server`: the outcome of a call, and a part of its text
    "none": (Outcome.DONE, "fine"),
    "log lines": (Outcome.DONE, "fine"),
    "against its schema": (Outcome.DONE, "fine"),
    "byte order mark": (Outcome.DONE, "fine"),
    "headers": (
        Outcome.FAILED,
        "may have run: it writes headers before its messages; over stdio each message is a line",
    ),
    "another id": (Outcome.FAILED, "may have run: it answered the request 9"),  # its id + 90
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
    """Return the result of a call. Check and log its duration."""
    started_at = time.monotonic()
    result = box.call(name, {})
    elapsed_s = time.monotonic() - started_at
    _LOG.info("%s: %.3f s, %s", name, elapsed_s, result.outcome.name)
    assert elapsed_s < MAX_CALL_S, result
    return result


def faulty_server(fault: str) -> StdioServer:
    return StdioServer(name=fault, command=sys.executable, args=("-I", SCRIPT, fault))


@pytest.fixture(scope="module")
def faulty_box() -> Iterator[ToolBox]:
    """Yield the tools of a server for each fault, beside servers without tools, or that cannot start."""
    servers = [*map(faulty_server, RESULTS), faulty_server("no tools"), ENDED_SERVER, ABSENT_SERVER]
    with open_toolbox(servers, LIMITS) as box:
        yield box


@pytest.mark.parametrize("fault", RESULTS)
def test_a_call_has_its_result_or_the_servers_fault_at_once(faulty_box: ToolBox, fault: str) -> None:
    outcome, text = RESULTS[fault]
    for _ in range(2):  # the second call is made over the same connection, or over a new one
        result = call(faulty_box, f"call_{fault.replace(' ', '_')}")
        assert result.outcome is outcome, result
        assert text in result.text


def test_unusable_servers_and_tools_are_named_and_usable_tools_beside_them_are_offered(faulty_box: ToolBox) -> None:
    assert faulty_box.problems == [
        "bad tools: a tool without a name is left out: {'name': 5}",
        "bad tools: its tool 'x' is left out: its inputSchema is not that of an object",
        "no tools: it has no tools",
        "ends: it ended; it wrote last: no key",
        "absent: No such file or directory: '/no/such/program'",
    ]
    assert {"bare", "call_bad_tools"} < faulty_box.tools.keys()
    assert faulty_box.tools["bare"].parameters == {"type": "object"}


def test_servers_that_cannot_start_are_named_before_their_timeout_and_a_good_one_is_used() -> None:
    started_at = time.monotonic()
    with open_toolbox([ENDED_SERVER, ABSENT_SERVER, faulty_server("none")], LIMITS) as box:
        elapsed_s = time.monotonic() - started_at
        _LOG.info("%.3f s to start", elapsed_s)
        assert [problem.partition(":")[0] for problem in box.problems] == ["ends", "absent"]
        assert call(box, "call_none").text == "fine"
    assert elapsed_s < MAX_CALL_S


def test_after_an_unreadable_answer_the_same_process_serves_the_next_call() -> None:
    with open_toolbox([faulty_server("one call in two")], LIMITS) as box:
        outcomes = [call(box, "call_one_call_in_two").outcome for _ in range(4)]
    assert sorted(outcomes, key=str) == [Outcome.DONE, Outcome.DONE, Outcome.FAILED, Outcome.FAILED]
    assert outcomes[:2] == outcomes[2:]


HTTP_TEXTS = {  # by the path of a server of `_FaultyHttp`: a part of a call's text
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
        request_id, fault = request.get("id"), self.path[1:]
        result = {
            "initialize": {
                "protocolVersion": "2025-06-18",
                "capabilities": {},
                "serverInfo": {"name": "s", "version": "1"},
            },
            "tools/list": {"tools": [{"name": fault}]},
            "tools/call": {"content": [{"type": "text", "text": "fine"}]},
        }.get(request["method"])
        good = json.dumps({"jsonrpc": "2.0", "id": request_id, "result": result}).encode()
        if request_id is None:
            self._send(202, b"")
        elif request["method"] != "tools/call":
            self._send(200, good)
        else:
            self._send_faulty(fault, good)

    def _send_faulty(self, fault: str, good: bytes) -> None:
        """Answer a call with the fault. Without one the answer is ``good``."""
        match fault:
            case "not-json":
                self._send(200, b"<html>")
            case "not-utf-8":
                self._send(200, good.replace(b"fine", b"\xe9"))
            case "html":
                self._send(200, b"<html>", "text/html")
            case "error":  # its message is reported, not the status 405 of do_GET
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
                self._send(int(fault.removeprefix("status-")), b"")

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def http_server_url(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Yield the URL of a server with this handler."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_http_servers_with_one_fault_each_fail_at_once_and_a_good_one_is_used() -> None:
    with http_server_url(_FaultyHttp) as url:
        servers: list[Server] = [HttpServer(name=fault, url=f"{url}/{fault}") for fault in (*HTTP_TEXTS, "good")]
        unreachable = HttpServer(name="unreachable", url="http://127.0.0.1:9/mcp")
        with open_toolbox([*servers, unreachable], LIMITS) as box:
            assert box.problems == ["unreachable: All connection attempts failed"]
            results = {fault: call(box, fault) for fault in (*HTTP_TEXTS, "good")}
    assert results.pop("good").text == "fine"
    for fault, text in HTTP_TEXTS.items():
        assert text in results[fault].text, fault
        assert results[fault].outcome in (Outcome.FAILED, Outcome.LOST)


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

    with http_server_url(Refusing) as url:
        web = HttpServer(name="web", url=url)
        with pytest.raises(ToolsError, match=f"no tool server starts: web: HTTP {status}"), open_toolbox([web], LIMITS):
            pass


def messages_for(output: ServerOutput, line: bytes) -> list[mcp_types.JSONRPCMessage]:
    """Return the messages that mcp's client gets for a line of a server's stdout."""
    try:
        message = mcp_types.jsonrpc_message_adapter.validate_json(line.decode(errors="surrogateescape"), by_name=False)
    except ValidationError as error:
        return [session_message.message for session_message in output.inspect(error)]
    return [session_message.message for session_message in output.inspect(SessionMessage(message))]


@given(
    text=st.binary(max_size=20),
    request_id=st.integers(0, 9),
    other_ids=st.sets(st.integers(0, 9)),
    num_missing=st.integers(0, 12),
)
@example(text=b'", "id": 5, "x": "', request_id=3, other_ids={5}, num_missing=0)
@example(text=b"\\ud83d", request_id=3, other_ids=set(), num_missing=0)
def test_an_answer_with_any_bytes_in_it_or_missing_at_its_end_is_not_dropped(
    text: bytes, request_id: int, other_ids: set[int], num_missing: int
) -> None:
    output = ServerOutput()
    for pending_id in {request_id} | other_ids:
        request = mcp_types.JSONRPCRequest(jsonrpc="2.0", id=pending_id, method="tools/call")
        output.record_sent(SessionMessage(request))
    content = b'[{"type": "text", "text": "%s"}]' % text
    line = b'{"jsonrpc": "2.0", "id": %d, "result": {"content": %s}}' % (request_id, content)
    answers = messages_for(output, line[: len(line) - num_missing])
    ids = [answer.id for answer in answers if isinstance(answer, mcp_types.JSONRPCResponse | mcp_types.JSONRPCError)]
    assert len(ids) == len(answers)
    if b'"id"' not in text:
        assert ids == [request_id]
    # A text can spell another id. The answer is then read as one to that request.
    assert request_id in ids or isinstance(answers[0], mcp_types.JSONRPCResponse)


@given(st.text().filter(lambda line: "jsonrpc" not in line and '"id"' not in line and "'id'" not in line))
@example("[2026-01-01 12:00] INFO listening")
@example("{ name: 'x' }")
@example("content-length:")
def test_a_line_of_a_log_does_not_end_the_connection(line: str) -> None:
    output = ServerOutput()
    output.record_sent(SessionMessage(mcp_types.JSONRPCRequest(jsonrpc="2.0", id=1, method="tools/call")))
    assert messages_for(output, line.encode(errors="replace")) == []
