"""Anthropic's official client, and the fields of its messages that tests compare."""

from typing import Any

from anthropic import Anthropic

from tests.server.forced_replies import TOOLS
from tests.server.in_process import SteppedServer
from tests.server.server_process import WAIT_S, Server

MESSAGES = "/v1/messages"
USER: list[Any] = [{"role": "user", "content": "a"}]
CLIENT_TOOLS: list[Any] = [
    {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in TOOLS
]
"""The tools of the forced replies."""


def client_of(server: SteppedServer | Server, key: str = "any") -> Anthropic:
    """Return the official client, without its own retries."""
    return Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=WAIT_S)


def message_of(client: Anthropic, **fields: Any) -> dict[str, Any]:
    """Return the message of a request that is not streamed."""
    message: dict[str, Any] = client.messages.create(**_request(fields)).to_dict()
    return message


def accumulate(client: Anthropic, **fields: Any) -> dict[str, Any]:
    """Return the message that the client accumulates from a stream."""
    with client.messages.stream(**_request(fields)) as stream:
        return stream.get_final_message().to_dict()


def fields_of(message: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a message that are the same in two equal answers."""
    usage = message["usage"]
    num_prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
    return {
        "role": message["role"],
        "content": [
            {name: value for name, value in block.items() if name != "signature"} for block in message["content"]
        ],
        "stop": (message["stop_reason"], message["stop_sequence"]),
        "tokens": (num_prompt, usage["output_tokens"], usage["output_tokens_details"]),
    }


def error_of(body: Any) -> tuple[str, str]:
    """Return the type and the message of an error body; check that it has Anthropic's fields and no others."""
    assert body.keys() == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["error"].keys() == {"type", "message"}
    return body["error"]["type"], body["error"]["message"]


def _request(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 500, "messages": USER, "tools": CLIENT_TOOLS} | fields
