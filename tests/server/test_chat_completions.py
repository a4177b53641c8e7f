"""Tests of chat completions as the official client sees them, on a served built-in model on two stages."""

import asyncio
import json
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from tests.server.server_process import WAIT_S, Server

QUESTION: list[Any] = [{"role": "user", "content": "What is 17 plus 25?"}]
WEATHER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
IN_PARIS: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


def stream_fields(server: Server, **request: Any) -> dict[str, Any]:
    """Return the fields that a client accumulates from the stream; check that role and reason are sent once."""
    fields: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": {}}
    options: Any = {"include_usage": True}
    roles, reasons = [], []
    for chunk in server.client.chat.completions.create(stream=True, stream_options=options, **request):
        if not chunk.choices:
            fields["usage"] = chunk.usage.to_dict()
            continue
        (choice,) = chunk.choices
        delta = choice.delta
        roles += [delta.role] if delta.role else []
        reasons += [choice.finish_reason] if choice.finish_reason else []
        fields["content"] += delta.content or ""
        fields["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or ():
            if call.index not in fields["tool_calls"]:
                fields["tool_calls"][call.index] = {"id": call.id, "name": call.function.name, "arguments": ""}
            else:
                assert call.id is None
                assert call.function.name is None
            fields["tool_calls"][call.index]["arguments"] += call.function.arguments
    assert roles == ["assistant"]
    (fields["finish_reason"],) = reasons
    fields["tool_calls"] = list(fields["tool_calls"].values())
    return fields


def body_fields(server: Server, **request: Any) -> dict[str, Any]:
    """Return the same fields of a body that is not streamed."""
    body = server.client.chat.completions.create(**request)
    (choice,) = body.choices
    assert body.usage is not None
    return {
        "content": choice.message.content,
        "reasoning_content": getattr(choice.message, "reasoning_content", ""),
        "tool_calls": [
            {"id": call.id, "name": call.function.name, "arguments": call.function.arguments}
            for call in choice.message.tool_calls or ()
        ],
        "finish_reason": choice.finish_reason,
        "usage": body.usage.to_dict(),
    }


def without_cache(fields: dict[str, Any]) -> dict[str, Any]:
    usage = {name: value for name, value in fields["usage"].items() if "cached" not in name and "prompt" not in name}
    return fields | {"usage": usage}


@pytest.mark.parametrize(
    ("request_fields", "finish_reason"),
    [
        ({"messages": QUESTION, "temperature": 0}, "stop"),
        ({"messages": QUESTION, "temperature": 0, "max_tokens": 7}, "length"),
        ({"messages": QUESTION, "temperature": 0, "stop": ["+ 25"]}, "stop"),
        ({"messages": IN_PARIS, "temperature": 0, "tools": WEATHER}, "tool_calls"),
        ({"messages": QUESTION, "seed": 5, "temperature": 1.0}, "stop"),
    ],
    ids=["text", "length", "stop", "call", "sampled"],
)
def test_the_client_accumulates_the_body(server: Server, request_fields: dict[str, Any], finish_reason: str) -> None:
    body = body_fields(server, model="any", **request_fields)
    assert without_cache(stream_fields(server, model="any", **request_fields)) == without_cache(body)
    assert body["finish_reason"] == finish_reason


def test_the_answer_has_its_reasoning_in_a_field_of_its_own(server: Server) -> None:
    body = body_fields(server, model="kimi-k2-tiny", messages=QUESTION, temperature=0)
    assert body["content"] == "17 + 25 = 42"
    assert body["reasoning_content"].startswith("17 + 25.")
    details = body["usage"]["completion_tokens_details"]
    assert 0 < details["reasoning_tokens"] < body["usage"]["completion_tokens"]


def test_a_stop_string_is_not_part_of_the_answer(server: Server) -> None:
    assert body_fields(server, model="any", messages=QUESTION, temperature=0, stop="+ 25")["content"] == "17 "


def test_a_tool_loop_continues_from_the_cache_with_ids_of_the_conversation(server: Server) -> None:
    first = server.client.chat.completions.create(model="any", messages=IN_PARIS, tools=WEATHER, temperature=0)
    message = first.choices[0].message
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert (call.id, json.loads(call.function.arguments)) == ("functions.get_weather:0", {"city": "Paris"})
    result = {"city": "Paris", "sky": "sunny", "temperature": 21}
    messages: list[Any] = [
        *IN_PARIS,
        message.to_dict(),
        {"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)},
    ]
    second = server.client.chat.completions.create(model="any", messages=messages, tools=WEATHER, temperature=0)
    assert second.choices[0].message.content == "In Paris it is sunny and 21 degrees."
    assert second.choices[0].finish_reason == "stop"
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= 0.95 * first.usage.prompt_tokens  # type: ignore[union-attr]


@pytest.mark.parametrize("call_id", ["functions_get_weather_0", "call_8f3a", "toolu_01", "functions.get_weather:7"])
def test_ids_of_any_form_in_the_history_give_the_same_prompt(server: Server, call_id: str) -> None:
    def follow_up(client_id: str) -> dict[str, Any]:
        function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
        messages: list[Any] = [
            *IN_PARIS,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": client_id, "type": "function", "function": function}],
            },
            {
                "role": "tool",
                "tool_call_id": client_id,
                "content": '{"city": "Paris", "sky": "sunny", "temperature": 21}',
            },
        ]
        return body_fields(server, model="any", messages=messages, tools=WEATHER, temperature=0)

    assert without_cache(follow_up(call_id)) == without_cache(follow_up("functions.get_weather:0"))


def test_tool_choice_none_calls_no_tool(server: Server) -> None:
    body = body_fields(server, model="any", messages=IN_PARIS, tools=WEATHER, tool_choice="none", temperature=0)
    assert body["tool_calls"] == []
    assert "tool_call" not in body["content"]


def test_log_probabilities_cover_the_content_and_not_the_reasoning(server: Server) -> None:
    request: dict[str, Any] = {"model": "any", "messages": QUESTION, "logprobs": True, "top_logprobs": 2}
    request["temperature"] = 0
    body = server.client.chat.completions.create(**request)
    (choice,) = body.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in choice.logprobs.content)
    chunks = server.client.chat.completions.create(stream=True, **request)
    logprobs = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
    joined = [token for part in logprobs if part is not None for token in part.content or ()]
    assert joined == choice.logprobs.content


def test_asynchronous_requests_run_side_by_side(server: Server) -> None:
    async def ask(client: AsyncOpenAI, number: int) -> str | None:
        messages: list[Any] = [{"role": "user", "content": f"What is {number} plus 25?"}]
        body = await client.chat.completions.create(model="any", messages=messages, temperature=0)
        return body.choices[0].message.content

    async def ask_all() -> list[str | None]:
        base_url = f"http://127.0.0.1:{server.port}/v1"
        async with AsyncOpenAI(base_url=base_url, api_key="any", timeout=WAIT_S) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(10, 16)))

    assert asyncio.run(ask_all()) == [f"{number} + 25 = {number + 25}" for number in range(10, 16)]


def test_a_prompt_that_is_too_long_has_the_code_and_the_phrases_that_agents_match(server: Server) -> None:
    messages: list[Any] = [{"role": "user", "content": "one two three " * 20_000}]
    with pytest.raises(BadRequestError) as caught:
        server.client.chat.completions.create(model="any", messages=messages)
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is 16384 tokens" in str(caught.value)
    assert "prompt is too long: " in str(caught.value)
    assert caught.value.request_id is not None


def test_the_model_is_listed_and_another_is_not_found(server: Server) -> None:
    (model,) = server.client.models.list()
    assert server.client.models.retrieve(model.id).to_dict() == model.to_dict()
    with pytest.raises(NotFoundError):
        server.client.models.retrieve("other/model")


def test_another_models_name_is_accepted_with_a_warning(server: Server) -> None:
    body = {"model": "gpt-9", "messages": QUESTION, "max_tokens": 1}
    answer = server.request("POST", "/v1/chat/completions", body)
    assert answer.status == 200
    assert "another model" in answer.headers["warning"]
    assert answer.json["model"] == "kimi-k2-tiny"


def test_health_has_a_status_and_no_body(server: Server) -> None:
    answer = server.request("GET", "/health")
    assert (answer.status, answer.body) == (200, b"")
