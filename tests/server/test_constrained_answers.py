"""Tests of constrained answers and sampling fields over HTTP: a served built-in model on two stages obeys them."""

import json
from typing import Any

import jsonschema
import pytest

from mlx_k2.server.chat_request import read_chat_request
from mlx_k2.server.language_model import LanguageModel
from mlx_k2.weights.checkpoint import describe_model
from mlx_k2.weights.model_files import read_model_files
from mlx_k2.weights.model_frontend import ModelFrontend
from mlx_k2.weights.model_source import BUILTIN, ModelSource
from tests.server.server_process import Server
from tests.server.test_chat_completions import IN_PARIS, QUESTION, WEATHER, body_fields, stream_fields

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
FORECAST: list[Any] = [
    *WEATHER,
    {"type": "function", "function": {"name": "set_forecast", "description": "Set it.", "parameters": SCHEMA}},
]
HOT_REQUEST: dict[str, Any] = {
    "model": "any",
    "messages": IN_PARIS,
    "temperature": 1.5,
    "max_tokens": 400,
    "extra_body": {"thinking": {"type": "enabled", "budget_tokens": 20}},
}
"""A request whose unconstrained answer would be of no form."""


@pytest.mark.parametrize("send_request", [stream_fields, body_fields])
@pytest.mark.parametrize("seed", range(3))
def test_an_answer_with_a_schema_is_valid_after_the_reasoning(server: Server, send_request: Any, seed: int) -> None:
    response_format = {"type": "json_schema", "json_schema": {"name": "forecast", "schema": SCHEMA, "strict": True}}
    answer = send_request(server, response_format=response_format, seed=seed, **HOT_REQUEST)
    jsonschema.validate(json.loads(answer["content"]), SCHEMA)
    assert answer["finish_reason"] == "stop"
    assert answer["reasoning_content"]


def test_a_json_object_is_an_object(server: Server) -> None:
    close = server.request("POST", "/tokenize", {"prompt": "}"}).json["tokens"]
    bias = {str(token_id): 30.0 for token_id in close}
    answer = body_fields(server, response_format={"type": "json_object"}, seed=1, logit_bias=bias, **HOT_REQUEST)
    assert isinstance(json.loads(answer["content"]), dict)
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize("send_request", [stream_fields, body_fields])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "set_forecast"}}], ids=["required", "named"]
)
def test_a_forced_call_has_valid_arguments(server: Server, send_request: Any, choice: Any) -> None:
    tools = FORECAST[1:] if choice == "required" else FORECAST
    answer = send_request(server, tools=tools, tool_choice=choice, parallel_tool_calls=False, seed=2, **HOT_REQUEST)
    (call,) = answer["tool_calls"]
    assert (call["name"], call["id"]) == ("set_forecast", "functions.set_forecast:0")
    jsonschema.validate(json.loads(call["arguments"]), SCHEMA)
    assert answer["finish_reason"] == "tool_calls"


def test_with_tool_choice_none_no_call_is_made(server: Server) -> None:
    for seed in range(3):
        answer = body_fields(server, tools=FORECAST, tool_choice="none", seed=seed, **HOT_REQUEST)
        assert answer["tool_calls"] == []
        assert "tool_call" not in answer["content"] + answer["reasoning_content"]


def test_an_operator_can_let_the_model_write_calls_without_a_grammar() -> None:
    files = read_model_files(ModelSource(path_or_repo=BUILTIN)).files
    frontend = ModelFrontend(describe_model(files, BUILTIN), 4000)
    chat = read_chat_request(json.dumps({"messages": IN_PARIS, "tools": FORECAST}).encode())
    for tool_grammar, forced in ((True, ["<|tool_call_begin|>"]), (False, [])):
        model = LanguageModel(frontend, "m", tool_grammar=tool_grammar)
        policy = model.chat(chat, "").submissions[0].policy
        assert policy is not None
        policy.accept(model.tokenizer.token_id("<|tool_calls_section_begin|>"))
        assert list(policy.forced()) == [model.tokenizer.token_id(name) for name in forced]


def test_a_schema_with_an_unknown_keyword_is_answered_with_a_warning_and_a_strict_one_is_refused(
    server: Server,
) -> None:
    schema = SCHEMA | {"not": {"required": ["rain"]}}
    response_format: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "forecast", "schema": schema}}
    body = {"messages": IN_PARIS, "max_tokens": 2, "response_format": response_format}
    answer = server.request("POST", "/v1/chat/completions", body)
    assert answer.status == 200
    assert answer.headers["warning"].startswith('299 mlx-k2 "')
    assert "not" in answer.headers["warning"]
    response_format["json_schema"]["strict"] = True
    refused = server.request("POST", "/v1/chat/completions", body)
    assert (refused.status, refused.error["param"]) == (400, "response_format")


def completion_ids(server: Server, **fields: Any) -> list[int]:
    """Return the tokens of a raw completion."""
    body = {"prompt": "Count from 3", "temperature": 0, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
    ids: list[int] = server.request("POST", "/v1/completions", body | fields).json["choices"][0]["token_ids"]
    return ids


def test_a_bias_makes_a_token_certain_or_impossible(server: Server) -> None:
    free = completion_ids(server)
    assert free[0] not in completion_ids(server, logit_bias={str(free[0]): -100})
    assert completion_ids(server, logit_bias={str(free[0]): 100}) == [free[0]] * 40


def test_a_penalty_ends_a_repetition(server: Server) -> None:
    first, second = completion_ids(server)[:2]
    assert first != second
    bias = {str(first): 60.0, str(second): 60.0}
    repeated = completion_ids(server, logit_bias=bias, presence_penalty=-2)
    assert set(repeated) <= {first, second}
    assert completion_ids(server, logit_bias=bias, frequency_penalty=2) != completion_ids(server, logit_bias=bias)


def test_an_answer_has_at_least_min_tokens(server: Server) -> None:
    fields: dict[str, Any] = {"messages": QUESTION, "temperature": 0, "model": "any"}
    num_tokens = body_fields(server, **fields)["usage"]["completion_tokens"]
    longer = body_fields(server, **fields, extra_body={"min_tokens": num_tokens + 10})
    assert longer["usage"]["completion_tokens"] >= num_tokens + 10
