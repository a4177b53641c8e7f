"""Inspection of what a tool server sends, before mcp's client reads it: unreadable answers and unusable tools."""

import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any, cast

import anyio
from mcp.shared.message import SessionMessage
from mcp_types import (
    PARSE_ERROR,
    ErrorData,
    JSONRPCError,
    JSONRPCRequest,
    JSONRPCResponse,
    RequestId,
    jsonrpc_message_adapter,
)
from pydantic import ValidationError

_MAX_QUOTED = 120
# Servers also log to their stdout, in plain text or in JSON. Such a line is not an answer.
_LIKE_AN_ANSWER = re.compile(
    r"""\s*[\[{"'].*(?:jsonrpc|"id".*"(?:result|error)"|"(?:result|error)".*"id")""", re.DOTALL
)
_HEADER = re.compile(r"(?i:content-length):\s*\d+\s*")
_ID = re.compile(r"""["']id["']\s*:\s*(?P<id>\d+)""")


class ServerOutput:
    """Information from one link to a server that mcp's client does not report."""

    def __init__(self) -> None:
        self.stray = ""
        """The last line on stdout that is not a message."""
        self.http_status = ""
        """The last status of an HTTP response that is an error."""
        self.problems: list[str] = []
        """Lines for the user about tools that cannot be offered."""
        self._pending: set[RequestId] = set()
        self._sent: set[RequestId] = set()

    def record_sent(self, message: SessionMessage) -> None:
        """Record that the client sends a message."""
        if isinstance(message.message, JSONRPCRequest):
            self._pending.add(message.message.id)
            self._sent.add(message.message.id)

    def received(self, message: SessionMessage | Exception) -> list[SessionMessage]:
        """Return the messages that mcp's client gets for a message, or for a line that is not one.

        An unreadable answer becomes an error. Fields for which the client would refuse a list of tools are removed.
        """
        if isinstance(message, Exception):
            return self._unreadable(message)
        answer = message.message
        if isinstance(answer, JSONRPCError) and answer.id is None:
            return self._errors(f"it sent an error without the id of a request: {answer.error.message}", "")
        if isinstance(answer, JSONRPCResponse | JSONRPCError):
            number = int(str(answer.id)) if str(answer.id).isdecimal() else cast("RequestId", answer.id)
            if number not in self._sent:
                return self._errors(f"it answered the request {answer.id!r}, which was not sent", "")
            self._pending.discard(number)
        if isinstance(answer, JSONRPCResponse) and isinstance(tools := answer.result.get("tools"), list):
            answer.result["tools"] = [tool for tool in map(self._offered, tools) if tool is not None]
        return [message]

    def _unreadable(self, error: Exception) -> list[SessionMessage]:
        """Return errors for a line that looks like an answer but is not a message; keep any other line."""
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        line, problem = (str(error), "") if first is None else (str(first["input"]), first["msg"])
        if first is not None and isinstance(first["input"], dict | list):
            line, problem = json.dumps(first["input"]), "not a JSON-RPC message"
        if line.startswith("\ufeff"):
            with contextlib.suppress(ValidationError):
                return self.received(SessionMessage(jsonrpc_message_adapter.validate_json(line[1:], by_name=False)))
        if _HEADER.fullmatch(line):
            return self._errors("it writes headers before its messages; over stdio each message is a line", "")
        quoted = ascii(line[:_MAX_QUOTED])
        if first is not None and first["type"] == "string_unicode":
            byte = next(ord(letter) & 0xFF for letter in line if "\udc80" <= letter <= "\udcff")
            problem = f"byte 0x{byte:02x} is not UTF-8"
        if _LIKE_AN_ANSWER.match(line):
            return self._errors(f"its answer cannot be read ({problem.removeprefix('Invalid JSON: ')}): {quoted}", line)
        self.stray = quoted if line.strip() else self.stray
        return []

    def _errors(self, reason: str, line: str) -> list[SessionMessage]:
        """Return an error for the request whose id is in ``line``; without one id, for all unanswered requests."""
        named = {int(found["id"]) for found in _ID.finditer(line)} & self._pending
        answered = named if len(named) == 1 else set(self._pending)
        self._pending -= answered
        error = ErrorData(code=PARSE_ERROR, message=reason)
        return [SessionMessage(JSONRPCError(jsonrpc="2.0", id=number, error=error)) for number in answered]

    def _offered(self, tool: Any) -> dict[str, Any] | None:
        """Return name, description and parameters of a tool as the client accepts them; None for an unusable tool."""
        fields = tool if isinstance(tool, dict) else {}
        name, description, schema = (fields.get(key) for key in ("name", "description", "inputSchema"))
        schema = {} if schema is None else schema
        if not isinstance(name, str):
            self.problems.append(f"a tool without a name is left out: {ascii(tool)[:_MAX_QUOTED]}")
        elif not isinstance(schema, dict) or schema.get("type", "object") != "object":
            self.problems.append(f"its tool {name!r} is left out: its inputSchema is not that of an object")
        else:
            text = description if isinstance(description, str) else ""
            return {"name": name, "description": text, "inputSchema": {"type": "object"} | schema}
        return None


@contextlib.asynccontextmanager
async def inspected(streams: Any, output: ServerOutput) -> AsyncIterator[Any]:
    """Yield streams for mcp's client that pass all messages of a transport's two streams through ``output``."""
    read, write = streams
    send, receive = anyio.create_memory_object_stream[SessionMessage](0)
    send_out, receive_out = anyio.create_memory_object_stream[SessionMessage](0)

    async def inward() -> None:
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async with send:
                async for message in read:
                    for passed in output.received(message):
                        await send.send(passed)

    async def outward() -> None:
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async with receive_out, write:
                async for message in receive_out:
                    output.record_sent(message)
                    await write.send(message)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(inward)
        tasks.start_soon(outward)
        yield receive, send_out
        tasks.cancel_scope.cancel()
