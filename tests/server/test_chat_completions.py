"""Tests of chat completions as the official client sees them, on a served built-in model on two stages."""

import asyncio
import json
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from tests.server.chat_client import (
    SUM_QUESTION,
    WEATHER_QUESTION,
    WEATHER_TOOLS,
    Completion,
    create_completion,
    stream_completion,
)
from tests.server.http_client import WAIT_S
from tests.server.server_process import Server

CITY_WEATHER = '{"city": "Paris", "sky": "sunny", "temperature": 21}'


@pytest.mark.parametrize(
    ("request_fields", "finish_reason"),
    [
        ({"messages": SUM_QUESTION, "temperature": 0}, "stop"),
        ({"messages": SUM_QUESTION, "temperature": 0, "max_tokens": 7}, "length"),
        ({"messages": SUM_QUESTION, "temperature": 0, "stop": ["+ 25"]}, "stop"),
        ({"messages": WEATHER_QUESTION, "temperature": 0, "tools": WEATHER_TOOLS}, "tool_calls"),
        ({"messages": SUM_QUESTION, "seed": 5, "temperature": 1.0}, "stop"),
    ],
    ids=["text", "length", "stop", "call", "sampled"],
)
def test_the_stream_equals_the_body(server: Server, request_fields: dict[str, Any], finish_reason: str) -> None:
    completion = create_completion(server, model="any", **request_fields)
    assert stream_completion(server, model="any", **request_fields) == completion
    assert completion.finish_reason == finish_reason


def test_the_answer_has_its_reasoning_in_a_separate_field(server: Server) -> None:
    completion = create_completion(server, model="kimi-k2-tiny", messages=SUM_QUESTION, temperature=0)
    assert completion.content == "17 + 25 = 42"
    assert completion.reasoning.startswith("17 + 25.")
    num_reasoning_tokens = completion.usage["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < num_reasoning_tokens < completion.usage["completion_tokens"]


def test_a_stop_string_is_not_part_of_the_answer(server: Server) -> None:
    completion = create_completion(server, model="any", messages=SUM_QUESTION, temperature=0, stop="+ 25")
    assert completion.content == "17 "


def test_a_tool_loop_continues_from_the_cache(server: Server) -> None:
    create = server.client.chat.completions.create
    request: dict[str, Any] = {"model": "any", "tools": WEATHER_TOOLS, "temperature": 0}
    first = create(messages=WEATHER_QUESTION, **request)
    message = first.choices[0].message
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert (call.id, json.loads(call.function.arguments)) == ("functions.get_weather:0", {"city": "Paris"})
    result = {"role": "tool", "tool_call_id": call.id, "content": CITY_WEATHER}
    messages: list[Any] = [*WEATHER_QUESTION, message.to_dict(), result]
    second = create(messages=messages, **request)
    assert second.choices[0].message.content == "In Paris it is sunny and 21 degrees."
    assert second.choices[0].finish_reason == "stop"
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= 0.95 * first.usage.prompt_tokens


@pytest.mark.parametrize("call_id", ["functions_get_weather_0", "call_8f3a", "toolu_01", "functions.get_weather:7"])
def test_ids_of_any_form_in_the_history_give_the_same_prompt(server: Server, call_id: str) -> None:
    def follow_up(call_id: str) -> Completion:
        function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
        calls = [{"id": call_id, "type": "function", "function": function}]
        messages: list[Any] = [
            *WEATHER_QUESTION,
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": call_id, "content": CITY_WEATHER},
        ]
        return create_completion(server, model="any", messages=messages, tools=WEATHER_TOOLS, temperature=0)

    assert follow_up(call_id) == follow_up("functions.get_weather:0")


def test_tool_choice_none_calls_no_tool(server: Server) -> None:
    request: dict[str, Any] = {"messages": WEATHER_QUESTION, "tools": WEATHER_TOOLS, "tool_choice": "none"}
    completion = create_completion(server, model="any", temperature=0, **request)
    assert completion.calls == []
    assert "tool_call" not in completion.content


def test_log_probabilities_cover_the_content_and_not_the_reasoning(server: Server) -> None:
    logprobs: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    request: dict[str, Any] = {"model": "any", "messages": SUM_QUESTION, "temperature": 0} | logprobs
    body = server.client.chat.completions.create(**request)
    (choice,) = body.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in choice.logprobs.content)
    chunks = server.client.chat.completions.create(stream=True, **request)
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
    assert [token for part in parts if part is not None for token in part.content or ()] == choice.logprobs.content


def test_asynchronous_requests_that_are_sent_at_once_get_their_own_answers(server: Server) -> None:
    async def ask(client: AsyncOpenAI, number: int) -> str | None:
        messages: list[Any] = [{"role": "user", "content": f"What is {number} plus 25?"}]
        body = await client.chat.completions.create(model="any", messages=messages, temperature=0)
        return body.choices[0].message.content

    async def ask_all() -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", timeout=WAIT_S) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(10, 16)))

    assert asyncio.run(ask_all()) == [f"{number} + 25 = {number + 25}" for number in range(10, 16)]


def test_the_error_for_a_prompt_that_is_too_long_has_the_code_and_phrases_that_agents_match(server: Server) -> None:
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
    body = {"model": "gpt-9", "messages": SUM_QUESTION, "max_tokens": 1}
    answer = server.request("POST", "/v1/chat/completions", body)
    assert answer.status == 200
    assert "another model" in answer.headers["warning"]
    assert answer.json["model"] == "kimi-k2-tiny"


def test_health_has_a_status_and_no_body(server: Server) -> None:
    answer = server.request("GET", "/health")
    assert (answer.status, answer.body) == (200, b"")
