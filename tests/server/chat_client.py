"""Requests for chat completions with OpenAI's official client, and the fields of answers that tests compare."""

from dataclasses import dataclass
from typing import Any

from tests.server.server_process import Server

SUM_QUESTION: list[Any] = [{"role": "user", "content": "What is 17 plus 25?"}]
WEATHER_QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER_TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
MCP_TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": f"mcp__server-{number}.tool",
            "description": f"Tool number {number}.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "limit": {"type": ["integer", "null"], "default": number}},
                "required": ["path"],
                "additionalProperties": False,
            },
            "strict": False,
        },
    }
    for number in range(39)
]
"""39 tools, which an agent declares beside the one that is called."""


@dataclass
class FunctionCall:
    """A call in a chat completion."""

    id: str
    name: str
    arguments: str


@dataclass
class Completion:
    """The fields that a chat completion has in common with its stream. ``usage`` has no counts of cached tokens."""

    content: str
    reasoning: str
    calls: list[FunctionCall]
    finish_reason: str
    usage: dict[str, Any]


def create_completion(server: Server, **request: Any) -> Completion:
    """Return a completion that is not streamed."""
    body = server.client.chat.completions.create(**request)
    (choice,) = body.choices
    message = choice.message
    calls = [FunctionCall(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    reasoning = getattr(message, "reasoning_content", "")
    return Completion(message.content or "", reasoning, calls, choice.finish_reason, _usage_without_cache(body))


def stream_completion(server: Server, **request: Any) -> Completion:
    """Return a completion joined from its stream, in which role, finish reason, ids and names may occur once only."""
    completion = Completion("", "", [], "", {})
    roles: list[str] = []
    finish_reasons: list[str] = []
    options: Any = {"include_usage": True}
    for chunk in server.client.chat.completions.create(stream=True, stream_options=options, **request):
        if not chunk.choices:
            completion.usage = _usage_without_cache(chunk)
            continue
        (choice,) = chunk.choices
        delta = choice.delta
        roles += [delta.role] if delta.role else []
        finish_reasons += [choice.finish_reason] if choice.finish_reason else []
        completion.content += delta.content or ""
        completion.reasoning += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or ():
            if call.index == len(completion.calls):
                completion.calls.append(FunctionCall(call.id, call.function.name, ""))
            else:
                assert (call.id, call.function.name) == (None, None)
            completion.calls[call.index].arguments += call.function.arguments
    assert roles == ["assistant"]
    (completion.finish_reason,) = finish_reasons
    return completion


def _usage_without_cache(body: Any) -> dict[str, Any]:
    usage: dict[str, Any] = body.usage.to_dict()
    return {name: value for name, value in usage.items() if name not in ("prompt_tokens_details", "cached_tokens")}
