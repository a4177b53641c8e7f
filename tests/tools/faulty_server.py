"""An MCP server over stdio, made without the mcp package, with the fault that its argument names."""

import json
import os
import sys
from typing import Any

MODE = sys.argv[1]


def send(raw: bytes) -> None:
    sys.stdout.buffer.write(raw + b"\n")
    sys.stdout.buffer.flush()


def message(number: Any, **content: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": number, **content}).encode()


def answer_call(number: int) -> bytes:
    """Return the answer to a call with the fault of MODE in it."""
    good = message(number, result={"content": [{"type": "text", "text": "fine"}]})
    match MODE:
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
            return json.dumps({"id": number, "result": {}}).encode()
        case "error without an id":
            return message(None, error={"code": -32000, "message": "cannot parse the request"})
        case "unknown content":
            return message(number, result={"content": [{"type": "hologram"}]})
        case "no content":
            return message(number, result={})
        case "internal error":
            return message(number, error={"code": -32603, "message": "the disk is full"})
        case "against its schema":
            return message(
                number, result={"content": [{"type": "text", "text": "fine"}], "structuredContent": {"data": 5}}
            )
        case "log lines":
            return b'calling\n[INFO] now\n{"level": "info"}\n{ a: 1 }\n' + good
        case "another id":
            return message(number + 90, result={})
        case "headers":
            return b"Content-Length: %d\r\n\r\n" % len(good) + good
        case "byte order mark":
            return b"\xef\xbb\xbf" + good
        case "one call in two":
            return good if number % 2 else good.replace(b"fine", b"\xc4\xe3")
    return good


def tools() -> list[dict[str, Any]]:
    schema = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    items: list[dict[str, Any]] = [{"name": f"call {MODE}", "inputSchema": {"type": "object"}, "outputSchema": schema}]
    if MODE == "bad tools":
        items += [
            {"name": 5},
            {"name": "x", "inputSchema": {"type": "string"}},
            {"name": "bare", "description": None},
        ]
    return items


def main() -> None:
    is_initialized = False
    for line in sys.stdin:
        request = json.loads(line)
        number, method = request.get("id"), request.get("method")
        if method != "initialize" and not is_initialized:
            sys.stderr.write("expected initialize request\n")
            sys.exit(1)
        if method == "initialize":
            is_initialized = True
            info = {"name": "faulty", "version": "1"}
            send(message(number, result={"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": info}))
        elif method == "tools/list" and MODE != "no tools":
            send(message(number, result={"tools": tools()}))
        elif method == "tools/call":
            if MODE == "dies":
                os._exit(3)
            if MODE == "closes stdout":
                os.close(1)
                sys.stdin.read()
            send(answer_call(number))
        elif number is not None:
            send(message(number, error={"code": -32601, "message": "Method not found"}))


if __name__ == "__main__":
    main()
