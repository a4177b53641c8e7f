"""Tests of responses on a served model: the cases of the Open Responses suite, a schema, and Codex's requests."""

import json
from typing import Any

import hypothesis
import jsonschema
import pytest

from tests.server.chat_client import MCP_TOOLS, WEATHER_TOOLS
from tests.server.responses_events import (
    RESPONSES_PATH,
    Fields,
    check_events,
    comparable_fields,
    item_text,
    parse_events,
)
from tests.server.server_process import Server
from tests.server.test_constrained_answers import SCHEMA

NUM_ROUNDS = 20 if hypothesis.settings.get_current_profile_name() == "long" else 5
WEATHER_FUNCTIONS: list[Any] = [{"type": "function", **tool["function"]} for tool in WEATHER_TOOLS]
SUM_QUESTION = "What is 17 plus 25?"
FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("id", "object", "model", "status", "truncation", "service_tier"), str),
    **dict.fromkeys(("created_at", "top_logprobs"), int),
    **dict.fromkeys(("output", "tools"), list),
    **dict.fromkeys(("text", "usage", "metadata", "reasoning"), dict),
    **dict.fromkeys(("parallel_tool_calls", "store", "background"), bool),
    **dict.fromkeys(("top_p", "temperature", "presence_penalty", "frequency_penalty"), float),
    "tool_choice": (str, dict),
}
"""The fields that are never null in a complete response, and their types."""
NULLABLE_FIELDS = (
    *("completed_at", "incomplete_details", "previous_response_id", "instructions", "error", "user"),
    *("max_output_tokens", "max_tool_calls", "safety_identifier", "prompt_cache_key"),
)


def create_response(server: Server, *, stream: bool = False, **fields: Any) -> Fields:
    """Return a response, or the last one of a stream. Check that it has all fields."""
    answer = server.request("POST", RESPONSES_PATH, {"model": "any", "temperature": 0, "stream": stream} | fields)
    assert answer.status == 200, answer.body
    response: Fields = check_events(parse_events(answer.body)) if stream else answer.json
    for name, types in FIELD_TYPES.items():
        assert isinstance(response[name], types), name
    assert set(NULLABLE_FIELDS) <= response.keys()
    for name in ("input_tokens", "output_tokens", "total_tokens"):
        assert response["usage"][name] > 0
    return response


def user_message(text: str) -> Fields:
    return {"type": "message", "role": "user", "content": text}


def answer_text(response: Fields) -> str:
    """Return the text of all messages in a response."""
    return "".join(item_text(item) for item in response["output"] if item["type"] == "message")


def test_open_responses_basic_a_question_is_answered(server: Server) -> None:
    response = create_response(server, input=[user_message(SUM_QUESTION)])
    assert response["status"] == "completed"
    assert "42" in answer_text(response)


def test_open_responses_streaming_the_events_are_valid_and_end_with_the_response(server: Server) -> None:
    question = [user_message(SUM_QUESTION)]
    response = create_response(server, stream=True, input=question)
    assert comparable_fields(response) == comparable_fields(create_response(server, input=question))
    assert response["status"] == "completed"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_open_responses_system_prompt_a_system_message_equals_instructions(server: Server, role: str) -> None:
    system = {"type": "message", "role": role, "content": "You are a helpful assistant."}
    response = create_response(server, input=[system, user_message(SUM_QUESTION)])
    expected = create_response(server, input=[user_message(SUM_QUESTION)], instructions=system["content"])
    assert comparable_fields(response) == comparable_fields(expected)
    assert response["status"] == "completed"


@pytest.mark.parametrize("stream", [False, True])
def test_open_responses_tool_calling_a_function_is_called(server: Server, stream: bool) -> None:
    question = [user_message("What is the weather in Paris?")]
    response = create_response(server, stream=stream, input=question, tools=WEATHER_FUNCTIONS)
    (call,) = [item for item in response["output"] if item["type"] == "function_call"]
    assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"city": "Paris"})
    assert call["call_id"] == "functions.get_weather:0"


def test_open_responses_image_input_is_refused_by_name(server: Server) -> None:
    """The model reads text only, and a client must not believe that it has seen an image."""
    image = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
    message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What is this?"}, image]}
    answer = server.request("POST", RESPONSES_PATH, {"input": [message]})
    assert (answer.status, answer.error["code"]) == (400, "unsupported_content")
    assert answer.error["param"] == "input[0].content[1]"


def test_open_responses_multi_turn_a_history_is_read(server: Server) -> None:
    first_turns = [user_message("What is 1 plus 1?"), {"type": "message", "role": "assistant", "content": "2"}]
    response = create_response(server, input=[*first_turns, user_message(SUM_QUESTION)])
    assert response["status"] == "completed"
    last_turn_alone = create_response(server, input=[user_message(SUM_QUESTION)])
    assert response["usage"]["input_tokens"] > last_turn_alone["usage"]["input_tokens"]


def test_open_responses_previous_response_id_continues_a_conversation(server: Server) -> None:
    first_question, second_question = user_message("What is 1 plus 1?"), user_message(SUM_QUESTION)
    first = create_response(server, input=[first_question])
    second = create_response(server, input=[second_question], previous_response_id=first["id"])
    expected = create_response(server, input=[first_question, *first["output"], second_question])
    assert second["previous_response_id"] == first["id"]
    assert comparable_fields(second) == comparable_fields(expected)


def test_log_probabilities_are_those_of_the_answer(server: Server) -> None:
    fields: Fields = {"input": SUM_QUESTION, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = server.request("POST", RESPONSES_PATH, {"temperature": 0, "stream": True} | fields)
    events = parse_events(answer.body)
    text_deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    streamed_entries = [entry for event in text_deltas for entry in event["logprobs"]]
    for response in (check_events(events), create_response(server, **fields)):
        (message,) = [item for item in response["output"] if item["type"] == "message"]
        (part,) = message["content"]
        assert [entry["token"] for entry in part["logprobs"]] == [entry["token"] for entry in streamed_entries]
        assert bytes(byte for entry in part["logprobs"] for byte in entry["bytes"]).decode() == part["text"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in streamed_entries)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}], ids=["required", "named"])
def test_a_forced_call_follows_reasoning_and_has_the_models_form(server: Server, choice: object) -> None:
    response = create_response(
        server, input=SUM_QUESTION, tools=WEATHER_FUNCTIONS, tool_choice=choice, max_output_tokens=200
    )
    first_item, *items = response["output"]
    assert first_item["type"] == "reasoning"
    call, *_ = [item for item in items if item["type"] == "function_call"]
    assert (call["call_id"], call["name"]) == ("functions.get_weather:0", "get_weather")
    assert "<|" not in answer_text(response)


def test_with_tool_choice_none_nothing_is_called(server: Server) -> None:
    response = create_response(
        server, input="What is the weather in Paris?", tools=WEATHER_FUNCTIONS, tool_choice="none", max_output_tokens=60
    )
    assert "function_call" not in [item["type"] for item in response["output"]]
    assert "<|" not in answer_text(response)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_the_schema_of_its_format(server: Server, stream: bool) -> None:
    answer_format = {"type": "json_schema", "name": "forecast", "schema": SCHEMA, "strict": True}
    sampling: Fields = {"temperature": 1.5, "seed": 1, "max_output_tokens": 400, "reasoning": {"effort": "minimal"}}
    response = create_response(server, stream=stream, input="The forecast?", text={"format": answer_format}, **sampling)
    jsonschema.validate(json.loads(answer_text(response)), SCHEMA)


CODEX_REQUEST: Fields = {
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
"""The fields of Codex's requests, and a temperature for equal answers in each run."""
WEATHER_CALL: Fields = {"type": "function_call", "name": "get_weather", "arguments": '{"city": "Paris"}'}
CODEX_TOOLS: list[Any] = [
    *({"type": "function", **tool["function"]} for tool in MCP_TOOLS),
    *WEATHER_FUNCTIONS,
    {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: "}},
    {"type": "web_search", "external_web_access": False},
    {"type": "local_shell"},
]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_loop_of_codex_with_40_functions_is_computed_from_the_cache_although_it_drops_reasoning(
    server: Server,
) -> None:
    """The client builds its history from the events of completed items, and leaves out the reasoning."""
    context = [{"type": "input_text", "text": "<environment_context><cwd>/tmp</cwd></environment_context>"}]
    history: list[Any] = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandboxed."}]},
        {"type": "message", "role": "user", "content": context},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Is it sunny in Paris?"}]},
    ]
    prompt_tokens = cached_tokens = num_turn_tokens = num_reasoning_items = 0
    for number in range(NUM_ROUNDS):
        body = CODEX_REQUEST | {"input": history, "tools": CODEX_TOOLS, "max_output_tokens": 60}
        answer = server.request("POST", RESPONSES_PATH, body)
        assert answer.status == 200, answer.body
        events = parse_events(answer.body)
        usage = check_events(events)["usage"]
        if number:
            prompt_tokens += usage["input_tokens"]
            cached_tokens += usage["input_tokens_details"]["cached_tokens"]
            assert usage["input_tokens"] > num_turn_tokens, "the prompt lacks the turn or its reasoning"
        num_turn_tokens = usage["input_tokens"] + usage["output_tokens"]
        items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        num_reasoning_items += sum(item["type"] == "reasoning" for item in items)
        history += [item for item in items if item["type"] != "reasoning"]
        calls = [item for item in items if item["type"] == "function_call"]
        if not calls:  # the small model may answer instead: then a call is added to its turn, which is not found again
            calls = [WEATHER_CALL | {"call_id": f"call_{number}"}]
            history += calls
            num_turn_tokens = 0
        result = json.dumps({"city": "Paris", "sky": "sunny", "temperature": number})
        history += [{"type": "function_call_output", "call_id": call["call_id"], "output": result} for call in calls]
    assert num_reasoning_items >= 1
    assert cached_tokens >= 0.95 * prompt_tokens
