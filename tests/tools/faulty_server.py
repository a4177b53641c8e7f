"""An MCP server over stdio, written without the mcp package, with the one fault that its argument names."""

import json
import os
import sys
from typing import Any

FAULT = sys.argv[1]


def send(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def message(request_id: Any, **content: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": request_id, **content}).encode()


def answer_call(request_id: int) -> bytes:
    """Return the answer to a call, with the fault if it is one of answers."""
    good = message(request_id, result={"content": [{"type": "text", "text": "fine"}]})
    match FAULT:
        case "not UTF-8":
            return good.replace(b"fine", b"caf\xe9")
        case "half a surrogate":
            return good.replace(b"fine", b"cut \\ud83d")
        case "control character":
            return good.replace(b"fine", b"a\x01b")
        case "not JSON":
            return repr(json.loads(good)).encode()
        case "several lines":
            return json.dumps(json.loads(good), indent=2).encode()
        case "cut":
            return good[:-5]
        case "no version":
            return json.dumps({"id": request_id, "result": {}}).encode()
        case "error without an id":
            return message(None, error={"code": -32000, "message": "cannot parse the request"})
        case "unknown content":
            return message(request_id, result={"content": [{"type": "hologram"}]})
        case "no content":
            return message(request_id, result={})
        case "internal error":
            return message(request_id, error={"code": -32603, "message": "the disk is full"})
        case "against its schema":
            return message(
                request_id, result={"content": [{"type": "text", "text": "fine"}], "structuredContent": {"data": 5}}
            )
        case "log lines":
            return b'calling\n[INFO] now\n{"level": "info"}\n{ a: 1 }\n' + good
        case "another id":
            return message(request_id + 90, result={})  # a request that was not sent
        case "headers":
            return b"Content-Length: %d\r\n\r\n" % len(good) + good
        case "byte order mark":
            return b"\xef\xbb\xbf" + good
        case "one call in two":
            # Ids count up by 1 over one connection.
            return good if request_id % 2 else good.replace(b"fine", b"\xc4\xe3")
    return good


def tools() -> list[dict[str, Any]]:
    schema = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    tool = {"name": f"call {FAULT}", "inputSchema": {"type": "object"}, "outputSchema": schema}
    if FAULT != "bad tools":
        return [tool]
    return [tool, {"name": 5}, {"name": "x", "inputSchema": {"type": "string"}}, {"name": "bare", "description": None}]


def main() -> None:
    is_initialized = False
    for line in sys.stdin:
        request = json.loads(line)
        request_id, method = request.get("id"), request.get("method")
        if method != "initialize" and not is_initialized:
            sys.stderr.write("expected initialize request\n")
            sys.exit(1)
        if method == "initialize":
            is_initialized = True
            info = {"name": "faulty", "version": "1"}
            send(message(request_id, result={"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": info}))
        elif method == "tools/list" and FAULT != "no tools":
            send(message(request_id, result={"tools": tools()}))
        elif method == "tools/call":
            if FAULT == "dies":
                os._exit(3)
            if FAULT == "closes stdout":
                os.close(1)
                sys.stdin.read()
            send(answer_call(request_id))
        elif request_id is not None:
            send(message(request_id, error={"code": -32601, "message": "Method not found"}))


if __name__ == "__main__":
    main()
