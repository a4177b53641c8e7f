"""Inspection of a tool server's messages before mcp's client reads them: unreadable answers, unusable tools."""

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

_MAX_QUOTED_CHARS = 120
# Servers also log to their stdout, in plain text or in JSON. This pattern matches answers only.
_ANSWER_START = re.compile(r"""\s*[\[{"'].*(?:jsonrpc|"id".*"(?:result|error)"|"(?:result|error)".*"id")""", re.DOTALL)
_CONTENT_LENGTH = re.compile(r"(?i:content-length):\s*\d+\s*")
_ID = re.compile(r"""["']id["']\s*:\s*(?P<id>\d+)""")


class ServerOutput:
    """The state of one link's messages, with information that mcp's client does not report."""

    def __init__(self) -> None:
        self.last_stray_line = ""
        """The last line on stdout that is not a message, quoted; '' if there is none."""
        self.http_status = ""
        """The status of the last HTTP response that is an error; '' if there is none."""
        self.problems: list[str] = []
        """Lines for the user about tools that cannot be used."""
        self._unanswered_ids: set[RequestId] = set()
        self._sent_ids: set[RequestId] = set()

    def record_sent(self, message: SessionMessage) -> None:
        """Record that the client sends a message."""
        if isinstance(message.message, JSONRPCRequest):
            self._unanswered_ids.add(message.message.id)
            self._sent_ids.add(message.message.id)

    def inspect(self, message: SessionMessage | Exception) -> list[SessionMessage]:
        """Return the messages that mcp's client gets instead of ``message``; an Exception reports an unreadable line.

        An unreadable answer becomes an error. Of each tool the name, the description and the parameters remain; a tool
        without a usable name or schema is left out.
        """
        if isinstance(message, Exception):
            return self._inspect_line(message)
        answer = message.message
        if isinstance(answer, JSONRPCError) and answer.id is None:
            return self._errors(f"it sent an error without the id of a request: {answer.error.message}", "")
        if isinstance(answer, JSONRPCResponse | JSONRPCError):
            # Some servers return a number as text.
            request_id = int(str(answer.id)) if str(answer.id).isdecimal() else cast("RequestId", answer.id)
            if request_id not in self._sent_ids:
                return self._errors(f"it answered the request {answer.id!r}, which was not sent", "")
            self._unanswered_ids.discard(request_id)
        if isinstance(answer, JSONRPCResponse) and isinstance(tools := answer.result.get("tools"), list):
            answer.result["tools"] = [tool for tool in map(self._usable_tool, tools) if tool is not None]
        return [message]

    def _inspect_line(self, error: Exception) -> list[SessionMessage]:
        """Return the message after a byte order mark, or errors for an unreadable answer; record any other line.

        ``error`` has the line.
        """
        line, problem = str(error), ""
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            line, problem = str(first["input"]), first["msg"].removeprefix("Invalid JSON: ")
            if isinstance(first["input"], dict | list):
                line, problem = json.dumps(first["input"]), "not a JSON-RPC message"
            elif first["type"] == "string_unicode":
                byte = next(ord(letter) & 0xFF for letter in line if "\udc80" <= letter <= "\udcff")
                problem = f"byte 0x{byte:02x} is not UTF-8"
        if line.startswith("\ufeff"):
            with contextlib.suppress(ValidationError):
                return self.inspect(SessionMessage(jsonrpc_message_adapter.validate_json(line[1:], by_name=False)))
        if _CONTENT_LENGTH.fullmatch(line):
            return self._errors("it writes headers before its messages; over stdio each message is a line", "")
        quoted = ascii(line[:_MAX_QUOTED_CHARS])
        if _ANSWER_START.match(line):
            return self._errors(f"its answer cannot be read ({problem}): {quoted}", line)
        if line.strip():
            self.last_stray_line = quoted
        return []

    def _errors(self, reason: str, line: str) -> list[SessionMessage]:
        """Return an error for the request whose id is in ``line``; without a single id, for all unanswered requests."""
        ids = self._unanswered_ids & {int(match["id"]) for match in _ID.finditer(line)}
        if len(ids) != 1:
            ids = set(self._unanswered_ids)
        self._unanswered_ids -= ids
        error = ErrorData(code=PARSE_ERROR, message=reason)
        return [SessionMessage(JSONRPCError(jsonrpc="2.0", id=request_id, error=error)) for request_id in ids]

    def _usable_tool(self, tool: Any) -> dict[str, Any] | None:
        """Return name, description and parameters of a tool as mcp's client accepts them; None if it is unusable."""
        fields = tool if isinstance(tool, dict) else {}
        name, description, schema = (fields.get(key) for key in ("name", "description", "inputSchema"))
        schema = {} if schema is None else schema
        if not isinstance(name, str):
            self.problems.append(f"a tool without a name is left out: {ascii(tool)[:_MAX_QUOTED_CHARS]}")
        elif not isinstance(schema, dict) or schema.get("type", "object") != "object":
            self.problems.append(f"its tool {name!r} is left out: its inputSchema is not that of an object")
        else:
            text = description if isinstance(description, str) else ""
            return {"name": name, "description": text, "inputSchema": {"type": "object"} | schema}
        return None


@contextlib.asynccontextmanager
async def inspected_streams(streams: Any, output: ServerOutput) -> AsyncIterator[Any]:
    """Yield streams for mcp's client whose messages pass through ``output`` from and to a transport's ``streams``."""
    from_server, to_server = streams
    to_client, client_input = anyio.create_memory_object_stream[SessionMessage](0)
    client_output, from_client = anyio.create_memory_object_stream[SessionMessage](0)

    async def relay_to_client() -> None:
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async with to_client:
                async for message in from_server:
                    for inspected in output.inspect(message):
                        await to_client.send(inspected)

    async def relay_to_server() -> None:
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async with from_client, to_server:
                async for message in from_client:
                    output.record_sent(message)
                    await to_server.send(message)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(relay_to_client)
        tasks.start_soon(relay_to_server)
        yield client_input, client_output
        tasks.cancel_scope.cancel()
