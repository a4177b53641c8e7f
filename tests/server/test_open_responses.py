"""Tests of responses on a served model: the cases of the Open Responses suite, a schema, and Codex's way of asking."""

import json
from typing import Any

import hypothesis
import jsonschema
import pytest

from tests.server.responses_events import Fields, check_events, events_of, fields_of, text_of, without_chunks
from tests.server.server_process import Server
from tests.server.test_constrained_answers import SCHEMA
from tests.server.test_request_shapes import OTHERS

PATH = "/v1/responses"
NUM_CALLS = 20 if hypothesis.settings.get_current_profile_name() == "long" else 5
WEATHER: list[Any] = [
    {
        "type": "function",
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
]
SUM = "What is 17 plus 25?"
REQUIRED: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("id", "object", "model", "status", "truncation", "service_tier"), str),
    **dict.fromkeys(("created_at", "top_logprobs"), int),
    **dict.fromkeys(("output", "tools"), list),
    **dict.fromkeys(("text", "usage", "metadata", "reasoning"), dict),
    **dict.fromkeys(("parallel_tool_calls", "store", "background"), bool),
    **dict.fromkeys(("top_p", "temperature", "presence_penalty", "frequency_penalty"), float),
    "tool_choice": (str, dict),
}
"""The fields that a complete response must have, and their types."""
NULLABLE = (
    *("completed_at", "incomplete_details", "previous_response_id", "instructions", "error", "user"),
    *("max_output_tokens", "max_tool_calls", "safety_identifier", "prompt_cache_key"),
)


def ask(server: Server, *, stream: bool = False, **fields: Any) -> Fields:
    """Return a complete response, received in either way, with all of its fields."""
    answer = server.request("POST", PATH, {"model": "any", "temperature": 0, "stream": stream} | fields)
    assert answer.status == 200, answer.body
    response: Fields = check_events(events_of(without_chunks(answer.body))) if stream else answer.json
    for name, kind in REQUIRED.items():
        assert isinstance(response[name], kind), name
    assert set(NULLABLE) <= response.keys()
    for part in ("input_tokens", "output_tokens", "total_tokens"):
        assert response["usage"][part] > 0
    return response


def user(text: str) -> Fields:
    return {"type": "message", "role": "user", "content": text}


def answer_of(response: Fields) -> str:
    return "".join(text_of(item) for item in response["output"] if item["type"] == "message")


def test_open_responses_basic_a_question_is_answered(server: Server) -> None:
    response = ask(server, input=[user(SUM)])
    assert response["status"] == "completed"
    assert "42" in answer_of(response)


def test_open_responses_streaming_the_events_are_valid_and_end_with_the_response(server: Server) -> None:
    response = ask(server, stream=True, input=[user(SUM)])
    assert fields_of(response) == fields_of(ask(server, input=[user(SUM)]))
    assert response["status"] == "completed"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_open_responses_system_prompt_a_system_message_is_read(server: Server, role: str) -> None:
    system = {"type": "message", "role": role, "content": "You are a helpful assistant."}
    response = ask(server, input=[system, user(SUM)])
    instructed = ask(server, input=[user(SUM)], instructions=system["content"])
    assert fields_of(response) == fields_of(instructed)
    assert response["status"] == "completed"


@pytest.mark.parametrize("stream", [False, True])
def test_open_responses_tool_calling_a_function_is_called(server: Server, stream: bool) -> None:
    response = ask(server, stream=stream, input=[user("What is the weather in Paris?")], tools=WEATHER)
    (call,) = [item for item in response["output"] if item["type"] == "function_call"]
    assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"city": "Paris"})
    assert call["call_id"] == "functions.get_weather:0"


def test_open_responses_image_input_is_refused_by_name(server: Server) -> None:
    """The model reads text only, and a client must not believe that it has seen an image."""
    image = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
    content = [{"type": "input_text", "text": "What is this?"}, image]
    answer = server.request("POST", PATH, {"input": [{"type": "message", "role": "user", "content": content}]})
    assert (answer.status, answer.error["code"]) == (400, "unsupported_content")
    assert answer.error["param"] == "input[0].content[1]"


def test_open_responses_multi_turn_a_history_is_read(server: Server) -> None:
    history = [user("What is 1 plus 1?"), {"type": "message", "role": "assistant", "content": "2"}, user(SUM)]
    response = ask(server, input=history)
    assert response["status"] == "completed"
    assert response["usage"]["input_tokens"] > ask(server, input=[user(SUM)])["usage"]["input_tokens"]


def test_open_responses_previous_response_id_continues_a_conversation(server: Server) -> None:
    first = ask(server, input=[user("What is 1 plus 1?")])
    second = ask(server, input=[user(SUM)], previous_response_id=first["id"])
    whole = ask(server, input=[user("What is 1 plus 1?"), *first["output"], user(SUM)])
    assert second["previous_response_id"] == first["id"]
    assert fields_of(second) == fields_of(whole)


def test_log_probabilities_are_those_of_the_answer(server: Server) -> None:
    fields: Fields = {"input": SUM, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = server.request("POST", PATH, {"temperature": 0, "stream": True} | fields)
    sent = events_of(without_chunks(answer.body))
    deltas = [entry for event in sent if event["type"] == "response.output_text.delta" for entry in event["logprobs"]]
    for response in (check_events(sent), ask(server, **fields)):
        (message,) = [item for item in response["output"] if item["type"] == "message"]
        (part,) = message["content"]
        assert [entry["token"] for entry in part["logprobs"]] == [entry["token"] for entry in deltas]
        assert bytes(byte for entry in part["logprobs"] for byte in entry["bytes"]).decode() == part["text"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in deltas)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}], ids=["required", "named"])
def test_a_forced_call_keeps_its_reasoning_and_the_model_s_form(server: Server, choice: object) -> None:
    response = ask(server, input=SUM, tools=WEATHER, tool_choice=choice, max_output_tokens=200)
    kinds = [item["type"] for item in response["output"]]
    assert kinds[0] == "reasoning"
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    assert (calls[0]["call_id"], calls[0]["name"]) == ("functions.get_weather:0", "get_weather")
    assert "<|" not in answer_of(response)


def test_with_tool_choice_none_nothing_is_called(server: Server) -> None:
    response = ask(
        server, input="What is the weather in Paris?", tools=WEATHER, tool_choice="none", max_output_tokens=60
    )
    assert "function_call" not in [item["type"] for item in response["output"]]
    assert "<|" not in answer_of(response)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_the_schema_of_its_format(server: Server, stream: bool) -> None:
    form = {"type": "json_schema", "name": "forecast", "schema": SCHEMA, "strict": True}
    limits: Fields = {"temperature": 1.5, "seed": 1, "max_output_tokens": 400, "reasoning": {"effort": "minimal"}}
    response = ask(server, stream=stream, input="The forecast?", text={"format": form}, **limits)
    jsonschema.validate(json.loads(answer_of(response)), SCHEMA)


CODEX: Fields = {
    "model": "kimi-k2-tiny",
    "instructions": "You are Codex, a coding agent.",
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "00000000-0000-0000-0000-000000000000",
    "text": {"verbosity": "medium"},
    "temperature": 0,
}
"""The fields of Codex's requests; the temperature is the test's."""
CODEX_TOOLS: list[Any] = [
    *({"type": "function", **tool["function"]} for tool in OTHERS),
    *WEATHER,
    {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: "}},
    {"type": "web_search", "external_web_access": False},
    {"type": "local_shell"},
]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_codex_with_40_tools_and_a_loop_of_calls_is_computed_from_the_cache_without_reasoning(server: Server) -> None:
    """The client builds its history from the items that are done, and leaves out the reasoning."""
    context = [{"type": "input_text", "text": "<environment_context><cwd>/tmp</cwd></environment_context>"}]
    history: list[Any] = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandboxed."}]},
        {"type": "message", "role": "user", "content": context},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Is it sunny in Paris?"}]},
    ]
    prompt_tokens = cached_tokens = written = num_calls = num_reasoning = 0
    for number in range(NUM_CALLS):
        body = CODEX | {"input": history, "tools": CODEX_TOOLS, "max_output_tokens": 60}
        answer = server.request("POST", PATH, body)
        assert answer.status == 200, answer.body
        events = events_of(without_chunks(answer.body))
        usage = check_events(events)["usage"]
        if number:
            prompt_tokens += usage["input_tokens"]
            cached_tokens += usage["input_tokens_details"]["cached_tokens"]
            assert usage["input_tokens"] > written, "the prompt has all tokens of the turn, its reasoning included"
        written = usage["input_tokens"] + usage["output_tokens"]
        items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        num_reasoning += sum(item["type"] == "reasoning" for item in items)
        history += [item for item in items if item["type"] != "reasoning"]
        calls = [item for item in items if item["type"] == "function_call"]
        if not calls:
            arguments = '{"city": "Paris"}'
            calls = [
                {"type": "function_call", "call_id": f"call_{number}", "name": "get_weather", "arguments": arguments}
            ]
            history += calls
            written = 0  # the turn is not the one that the model wrote
        for call in calls:
            num_calls += 1
            result = json.dumps({"city": "Paris", "sky": "sunny", "temperature": number})
            history.append({"type": "function_call_output", "call_id": call["call_id"], "output": result})
    assert num_calls >= NUM_CALLS
    assert num_reasoning >= 1
    assert cached_tokens >= 0.95 * prompt_tokens
