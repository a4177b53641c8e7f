"""Tests of requests for responses: the chat request that each means, and what is refused."""

import json
import time
from typing import Any

import pytest

from mlx_k2.server.api_errors import ApiError
from mlx_k2.server.responses_input import InputReader
from mlx_k2.server.responses_request import Conversation, conversation_of, in_responses_words, read_responses_request
from mlx_k2.server.turn_store import TURN_HANDLE_FIELD

CALL_ITEMS: list[Any] = [
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}', "id": "fc_1"},
    {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
]
WEB_SEARCH = {"type": "web_search", "external_web_access": True}
FUNCTION_F = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": False}
FUNCTION_G = {"type": "function", "name": "g"}


def conversation(earlier: list[Any] | None = None, **fields: Any) -> Conversation:
    """Return the conversation of a request that continues the ``earlier`` messages."""
    return conversation_of(read_responses_request(json.dumps({"input": "a"} | fields).encode()), earlier or [])


def messages(items: list[Any]) -> list[dict[str, Any]]:
    """Return the messages for input items."""
    return conversation(input=items).chat.messages


def refusal(**fields: Any) -> ApiError:
    """Return the error that a client gets."""
    try:
        request = read_responses_request(json.dumps({"input": "a"} | fields).encode())
    except ApiError as error:
        return error
    with pytest.raises(ApiError) as caught:
        conversation_of(request)
    return in_responses_words(caught.value)


def test_a_text_is_a_message_of_the_user_after_the_instructions() -> None:
    with_instructions = conversation(instructions="Be brief.")
    user_message = {"role": "user", "content": "a"}
    assert with_instructions.chat.messages == [{"role": "system", "content": "Be brief."}, user_message]
    assert with_instructions.messages == [user_message], "the instructions are stored, too"


def test_the_items_of_one_turn_of_the_model_are_one_message() -> None:
    reasoning = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Why?"}]}
    answer = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I call."}]}
    outputs = [
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
    ]
    calls = [
        {"id": "c1", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "c2", "function": {"name": "g", "arguments": "{}"}},
    ]
    assert messages([{"role": "user", "content": "a"}, reasoning, answer, *CALL_ITEMS, *outputs, answer]) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "I call.", "reasoning_content": "Why?", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": "I call."},
    ]


def test_items_with_another_handle_begin_another_turn() -> None:
    def reasoning(handle: str) -> dict[str, Any]:
        return {"type": "reasoning", "summary": [], "encrypted_content": handle}

    answer = {"type": "message", "role": "assistant", "content": "b"}
    turns = messages([reasoning("h1"), answer, reasoning("h1"), reasoning("h2"), answer])
    assert turns == [{"role": "assistant", "content": "b", TURN_HANDLE_FIELD: handle} for handle in ("h1", "h2")]


def test_a_summary_is_used_as_reasoning_only_if_the_reasoning_is_missing() -> None:
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": text} for text in ("s", "t")]}
    assert messages([summary, *CALL_ITEMS])[0]["reasoning_content"] == "st"
    complete = summary | {"content": [{"type": "reasoning_text", "text": "Why?"}]}
    assert messages([complete, *CALL_ITEMS])[0]["reasoning_content"] == "Why?"


def test_the_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert messages([{"type": "message", "role": "developer", "content": parts}]) == [
        {"role": "developer", "content": "ab"}
    ]


def test_the_image_of_a_tool_is_replaced_by_a_line_of_text() -> None:
    output = [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "x"}]
    *_, result = messages([*CALL_ITEMS, {"type": "function_call_output", "call_id": "c1", "output": output}])
    assert result["content"] == "a[input_image left out: this model reads text only]"


def test_a_response_continues_an_earlier_conversation() -> None:
    earlier = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    continued = conversation(earlier, instructions="s")
    assert [message["content"] for message in continued.chat.messages] == ["s", "x", "y", "a"]
    assert [message["content"] for message in continued.messages] == ["x", "y", "a"]


def test_an_item_whose_type_is_null_is_a_message() -> None:
    (message,) = messages([{"type": None, "role": "user", "content": "a"}])
    assert message["content"] == "a"


def test_a_turn_of_very_many_items_is_joined_in_linear_time() -> None:
    num_items, text = 20_000, "a" * 1000
    items: list[Any] = [{"role": "assistant", "content": text}, {"type": "reasoning", "summary": [], "content": text}]
    reader = InputReader()
    started_at = time.process_time()
    reader.read(items * num_items)
    assert time.process_time() - started_at < 5
    joined_text = text * num_items
    assert reader.messages == [{"role": "assistant", "content": joined_text, "reasoning_content": joined_text}]


def test_tools_that_run_on_a_server_and_unknown_items_are_left_out_and_named() -> None:
    custom = {"type": "custom", "name": "apply_patch"}
    namespace = {"type": "namespace", "name": "mcp", "tools": [FUNCTION_F]}
    mixed = conversation(
        tools=[WEB_SEARCH, FUNCTION_F, custom, namespace, {"type": "local_shell"}],
        input=[{"role": "user", "content": "a"}, {"type": "web_search_call", "id": "ws_1", "status": "completed"}],
    )
    function = {name: value for name, value in FUNCTION_F.items() if name != "type"}
    assert mixed.chat.tools == [{"type": "function", "function": function}]
    assert len(mixed.chat.messages) == 1
    assert mixed.warnings == (
        "tools of these types are left out: custom, local_shell, namespace, web_search",
        "input items of these types are left out: web_search_call",
    )


def test_a_request_whose_tools_all_run_on_a_server_has_none() -> None:
    assert conversation(tools=[WEB_SEARCH]).chat.tools is None


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_a_tool_choice_that_is_a_word_is_unchanged(choice: str) -> None:
    assert conversation(tools=[FUNCTION_F], tool_choice=choice).chat.tool_choice == choice


def test_the_choice_of_one_function_has_the_form_of_chat_completions() -> None:
    chat = conversation(tools=[FUNCTION_F, FUNCTION_G], tool_choice={"type": "function", "name": "g"}).chat
    assert chat.tool_choice == {"type": "function", "function": {"name": "g"}}


def test_the_choice_of_allowed_tools_leaves_out_the_others() -> None:
    choice = {"type": "allowed_tools", "mode": "required", "tools": [FUNCTION_G]}
    chat = conversation(tools=[FUNCTION_F, FUNCTION_G], tool_choice=choice).chat
    assert (chat.tool_choice, chat.tools) == ("required", [{"type": "function", "function": {"name": "g"}}])


def test_very_many_tools_and_allowed_tools_are_refused_in_linear_time() -> None:
    tools = [{"type": "function", "name": f"f{number}"} for number in range(40_000)]
    started_at = time.process_time()
    with pytest.raises(ApiError, match="40000 tools are declared"):
        conversation(tools=tools, tool_choice={"type": "allowed_tools", "tools": [{"name": [1]}, *tools]})
    assert time.process_time() - started_at < 5


@pytest.mark.parametrize(
    ("text", "response_format"),
    [
        (
            {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}, "verbosity": "low"},
            {"type": "json_schema", "json_schema": {"schema": {}, "strict": True}},
        ),
        ({"format": {"type": "json_object"}}, {"type": "json_object"}),
        ({"verbosity": "high"}, None),
    ],
)
def test_the_format_of_the_answer_has_the_form_of_chat_completions(text: object, response_format: object) -> None:
    assert conversation(text=text).chat.response_format == response_format


@pytest.mark.parametrize(
    ("effort", "thinks", "budget"),
    [("none", False, None), ("low", True, 2048), ("xhigh", True, None), (None, None, None)],
)
def test_effort_is_a_budget_of_thinking(effort: str | None, thinks: bool | None, budget: int | None) -> None:
    chat = conversation(reasoning={"effort": effort, "summary": "auto"}).chat
    assert (chat.wants_thinking, chat.thinking_budget) == (thinks, budget)


def test_limits_sampling_and_log_probabilities_are_passed_on() -> None:
    chat = conversation(
        max_output_tokens=7, temperature=0.5, top_p=0.9, seed=3, include=["message.output_text.logprobs"]
    ).chat
    assert (chat.limit_tokens, chat.temperature, chat.top_p, chat.seed, chat.num_logprobs) == (7, 0.5, 0.9, 3, 0)
    assert conversation(top_logprobs=2).chat.num_logprobs == 2
    assert conversation(include=["reasoning.encrypted_content"]).chat.num_logprobs is None


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": 5}, "input", None),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
            "unsupported_content",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", None),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name", None),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", None),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "1"}]}, "input", None),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content", None),
        ({"max_output_tokens": 0}, "max_output_tokens", None),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort", None),
        ({"tools": [{"type": "function"}]}, "tools[0].name", None),
        ({"tools": [FUNCTION_F, FUNCTION_F]}, "tools", None),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", None),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.tools", None),
        ({"background": True}, "background", None),
        ({"conversation": "conv_1"}, "conversation", None),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", None),
        ({"n": 2}, "n", None),
        ({"top_logprobs": 21}, "top_logprobs", None),
    ],
    ids=str,
)
def test_a_refusal_has_the_name_that_the_field_has_in_this_api(
    fields: dict[str, Any], param: str, code: str | None
) -> None:
    error = refusal(**fields)
    assert (error.status, error.param, error.code) == (400, param, code)
    assert "messages" not in error.message, "it names the field of a chat request"
