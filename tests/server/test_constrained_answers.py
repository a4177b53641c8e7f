"""Tests of constrained answers and sampling fields over HTTP: a served built-in model on two stages obeys them."""

import json
from typing import Any

import jsonschema
import pytest

from mlx_k2.server.chat_request import read_chat_request
from mlx_k2.server.language_model import LanguageModel
from tests.server.chat_client import (
    SUM_QUESTION,
    WEATHER_QUESTION,
    WEATHER_TOOLS,
    create_completion,
    stream_completion,
)
from tests.server.http_client import CHAT_PATH
from tests.server.in_process import builtin_frontend
from tests.server.server_process import Server

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "sky": {"enum": ["sunny", "cloudy"]},
        "warm": {"type": "boolean"},
        "days": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 9},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["sky", "warm", "days"],
    "additionalProperties": False,
}
FORECAST_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "set_forecast", "description": "Set it.", "parameters": SCHEMA},
}
HOT_REQUEST: dict[str, Any] = {
    "model": "any",
    "messages": WEATHER_QUESTION,
    "temperature": 1.5,
    "max_tokens": 400,
    "extra_body": {"thinking": {"type": "enabled", "budget_tokens": 20}},
}
"""A request at a temperature at which an unconstrained answer is no JSON."""
NUM_TOKENS = 40


@pytest.mark.parametrize("receive", [stream_completion, create_completion])
@pytest.mark.parametrize("seed", range(3))
def test_an_answer_with_a_schema_is_valid_after_the_reasoning(server: Server, receive: Any, seed: int) -> None:
    answer_format = {"type": "json_schema", "json_schema": {"name": "forecast", "schema": SCHEMA, "strict": True}}
    completion = receive(server, response_format=answer_format, seed=seed, **HOT_REQUEST)
    jsonschema.validate(json.loads(completion.content), SCHEMA)
    assert completion.finish_reason == "stop"
    assert completion.reasoning


def test_an_answer_in_the_format_json_object_is_an_object(server: Server) -> None:
    """A bias for the closing brace ends the object within the token limit."""
    brace_ids = server.request("POST", "/tokenize", {"prompt": "}"}).json["tokens"]
    fields: dict[str, Any] = {"response_format": {"type": "json_object"}, "logit_bias": dict.fromkeys(brace_ids, 30.0)}
    completion = create_completion(server, seed=1, **fields, **HOT_REQUEST)
    assert isinstance(json.loads(completion.content), dict)
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize("receive", [stream_completion, create_completion])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "set_forecast"}}], ids=["required", "named"]
)
def test_a_forced_call_has_valid_arguments(server: Server, receive: Any, choice: Any) -> None:
    tools = [FORECAST_TOOL] if choice == "required" else [*WEATHER_TOOLS, FORECAST_TOOL]
    completion = receive(server, tools=tools, tool_choice=choice, parallel_tool_calls=False, seed=2, **HOT_REQUEST)
    (call,) = completion.calls
    assert (call.name, call.id) == ("set_forecast", "functions.set_forecast:0")
    jsonschema.validate(json.loads(call.arguments), SCHEMA)
    assert completion.finish_reason == "tool_calls"


def test_with_tool_choice_none_no_call_is_made(server: Server) -> None:
    for seed in range(3):
        completion = create_completion(server, tools=[FORECAST_TOOL], tool_choice="none", seed=seed, **HOT_REQUEST)
        assert completion.calls == []
        assert "tool_call" not in completion.content + completion.reasoning


@pytest.mark.parametrize(("tool_grammar", "forced_markers"), [(True, ["<|tool_call_begin|>"]), (False, [])])
def test_an_operator_can_let_the_model_write_calls_without_a_grammar(
    tool_grammar: bool, forced_markers: list[str]
) -> None:
    chat = read_chat_request(json.dumps({"messages": WEATHER_QUESTION, "tools": [FORECAST_TOOL]}).encode())
    model = LanguageModel(builtin_frontend(), "m", tool_grammar=tool_grammar)
    policy = model.chat(chat, owner="").submissions[0].policy
    assert policy is not None
    policy.accept(model.tokenizer.token_id("<|tool_calls_section_begin|>"))
    assert list(policy.forced()) == [model.tokenizer.token_id(marker) for marker in forced_markers]


def test_an_unsupported_keyword_gives_a_warning_and_with_strict_an_error(
    server: Server,
) -> None:
    schema = SCHEMA | {"not": {"required": ["rain"]}}
    json_schema: dict[str, Any] = {"name": "forecast", "schema": schema}
    answer_format = {"type": "json_schema", "json_schema": json_schema}
    body = {"messages": WEATHER_QUESTION, "max_tokens": 2, "response_format": answer_format}
    answer = server.request("POST", CHAT_PATH, body)
    assert answer.status == 200
    assert answer.headers["warning"].startswith('299 mlx-k2 "')
    assert "[?not?]" in answer.headers["warning"], (
        'the warning does not name the keyword ["not"], with its quotes as ? in a header'
    )
    json_schema["strict"] = True
    refused = server.request("POST", CHAT_PATH, body)
    assert (refused.status, refused.error["param"]) == (400, "response_format")


def completion_ids(server: Server, **fields: Any) -> list[int]:
    """Return the NUM_TOKENS token ids of a text completion."""
    length = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    body = {"prompt": "Count from 3", "temperature": 0, "return_token_ids": True} | length
    ids: list[int] = server.request("POST", "/v1/completions", body | fields).json["choices"][0]["token_ids"]
    return ids


def test_a_bias_makes_a_token_certain_or_impossible(server: Server) -> None:
    first_id = completion_ids(server)[0]
    assert first_id not in completion_ids(server, logit_bias={first_id: -100})
    assert completion_ids(server, logit_bias={first_id: 100}) == [first_id] * NUM_TOKENS


def test_a_frequency_penalty_changes_a_repetition_and_a_presence_penalty_does_not(server: Server) -> None:
    """The biases allow two tokens only. Unlike a presence penalty, a frequency penalty grows with each repetition."""
    first_id, second_id = completion_ids(server)[:2]
    assert first_id != second_id
    bias = {first_id: 60.0, second_id: 60.0}
    repetition = completion_ids(server, logit_bias=bias)
    assert set(repetition) <= {first_id, second_id}
    assert completion_ids(server, logit_bias=bias, presence_penalty=-2) == repetition
    assert completion_ids(server, logit_bias=bias, frequency_penalty=2) != repetition


def test_an_answer_has_at_least_min_tokens(server: Server) -> None:
    fields: dict[str, Any] = {"messages": SUM_QUESTION, "temperature": 0, "model": "any"}
    num_tokens = create_completion(server, **fields).usage["completion_tokens"]
    longer = create_completion(server, **fields, extra_body={"min_tokens": num_tokens + 10})
    assert longer.usage["completion_tokens"] >= num_tokens + 10
