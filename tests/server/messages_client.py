"""Requests for messages with Anthropic's official client, and the fields of answers that tests compare."""

from typing import Any

from anthropic import Anthropic

from tests.server.forced_replies import TOOLS, USER_MESSAGES
from tests.server.http_client import WAIT_S
from tests.server.in_process import SteppedServer
from tests.server.server_process import Server

MESSAGES_PATH = "/v1/messages"
CLIENT_TOOLS: list[Any] = [
    {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in TOOLS
]
"""The tools of the forced replies as the Messages API declares them."""


def client_of(server: SteppedServer | Server, key: str = "any") -> Anthropic:
    """Return the official client, without its own retries."""
    return Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=WAIT_S)


def create_message(client: Anthropic, **fields: Any) -> dict[str, Any]:
    """Return the message of a request that is not streamed."""
    message: dict[str, Any] = client.messages.create(**_request(fields)).to_dict()
    return message


def stream_message(client: Anthropic, **fields: Any) -> dict[str, Any]:
    """Return the message that the client's own accumulator joins from a stream."""
    with client.messages.stream(**_request(fields)) as stream:
        return stream.get_final_message().to_dict()


def comparable_fields(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without the fields that differ between equal answers: id, signature, number of cached tokens."""
    usage = message["usage"]
    num_prompt_tokens = usage["input_tokens"] + usage["cache_read_input_tokens"]
    return {
        "role": message["role"],
        "content": [_without_signature(block) for block in message["content"]],
        "stop": (message["stop_reason"], message["stop_sequence"]),
        "tokens": (num_prompt_tokens, usage["output_tokens"], usage["output_tokens_details"]),
    }


def error_of(body: Any) -> tuple[str, str]:
    """Return the type and the message of an error in Anthropic's shape, which has no other fields."""
    assert body.keys() == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["error"].keys() == {"type", "message"}
    return body["error"]["type"], body["error"]["message"]


def _without_signature(block: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in block.items() if name != "signature"}


def _request(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 500, "messages": USER_MESSAGES, "tools": CLIENT_TOOLS} | fields
