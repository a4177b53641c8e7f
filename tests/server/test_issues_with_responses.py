"""Tests of errors that other servers had with clients of the Responses API, and with Kimi K2 in that API.

A test is named after an issue where the error was described. `TESTS_BY_ERROR` lists these tests, and tests
in other files of the same errors.
"""

from collections.abc import Callable
from typing import Any

import pytest

from mlx_k2.server.chat_request import EFFORT_TOKENS
from tests.server import test_open_responses, test_responses, test_responses_format, test_responses_request
from tests.server.forced_replies import CALLS_REPLY, USER_MESSAGES, forced_server
from tests.server.in_process import SteppedServer
from tests.server.responses_events import FUNCTIONS, RESPONSES_PATH, check_events, parse_events
from tests.server.test_responses_format import body_and_stream
from tests.text.replies import call, section


def num_prompt_tokens(server: SteppedServer, items: list[Any]) -> int:
    body = {"input": items, "tools": FUNCTIONS, "max_output_tokens": 1, "store": False}
    answer = server.request("POST", RESPONSES_PATH, body)
    assert answer.status == 200, answer.body
    return int(answer.json["usage"]["input_tokens"])


@pytest.mark.parametrize("kind", ["custom", "web_search", "local_shell", "namespace", "mcp", "image_generation", "x"])
def test_unsloth_5141_unknown_types_of_tools_and_fields_are_no_error(fast_server: SteppedServer, kind: str) -> None:
    tool = {"type": kind, "name": "t", "x": [1]}
    message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a", "x": 1}], "x": {}}
    body = {"input": [message], "tools": [tool, FUNCTIONS[0] | {"defer_loading": True}], "client_metadata": {"x": 1}}
    assert fast_server.request("POST", RESPONSES_PATH, body | {"max_output_tokens": 1}).status == 200


@pytest.mark.parametrize("effort", EFFORT_TOKENS)
def test_claude_code_69379_every_effort_is_accepted(fast_server: SteppedServer, effort: str) -> None:
    body = {"input": "a", "reasoning": {"effort": effort, "summary": "detailed"}, "max_output_tokens": 1}
    assert fast_server.request("POST", RESPONSES_PATH, body).status == 200


@pytest.mark.parametrize("text", ["", "a", " "])
def test_mlx_lm_1327_a_short_prompt_is_no_404(fast_server: SteppedServer, text: str) -> None:
    assert fast_server.request("POST", RESPONSES_PATH, {"input": text, "max_output_tokens": 1}).status == 200


@pytest.mark.parametrize("strict", [True, False, None])
def test_sglang_8087_strict_functions_are_accepted(fast_server: SteppedServer, strict: bool | None) -> None:
    body = {"input": "a", "tools": [FUNCTIONS[0] | {"strict": strict}], "max_output_tokens": 1}
    assert fast_server.request("POST", RESPONSES_PATH, body).status == 200


@pytest.mark.parametrize("ids", [("functions.f:0", "functions.f:1"), ("call_x", "call_y"), ("same", "same")])
def test_kimi_k2_128_ids_of_any_form_give_prompts_of_equal_length(
    fast_server: SteppedServer, ids: tuple[str, str]
) -> None:
    def history(*ids: str) -> list[Any]:
        calls = [{"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}"} for call_id in ids]
        outputs = [{"type": "function_call_output", "call_id": call_id, "output": "1"} for call_id in ids]
        return [*USER_MESSAGES, *calls, *outputs]

    expected = num_prompt_tokens(fast_server, history("functions.f:0", "functions.f:1"))
    assert num_prompt_tokens(fast_server, history(*ids)) == expected


def test_sglang_33343_a_new_call_has_a_number_that_does_not_occur() -> None:
    """The client has cut off the beginning of its history: the first call in it has the number 80."""
    history = [
        {"type": "function_call", "call_id": "functions.f:80", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "functions.f:80", "output": "1"},
    ]
    # the same history in the form of chat completions, from which the length of the prompt is computed
    calls = [{"id": "functions.f:80", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    messages = [*USER_MESSAGES, turn, {"role": "tool", "tool_call_id": "functions.f:80", "content": "1"}]
    new_calls = section(call("functions.f:81", "{}"), call("functions.mcp__a-b.c:82", "{}"))
    items: list[Any] = [*USER_MESSAGES, *history]
    with forced_server(f"<think></think>{new_calls}", messages=messages) as server:
        response = server.client.responses.create(model="m", input=items, tools=FUNCTIONS)
    ids = [item.call_id for item in response.output if item.type == "function_call"]
    assert ids == ["functions.f:81", "functions.mcp__a-b.c:82"]


def test_sglang_23341_reasoning_that_never_ends_is_kept() -> None:
    body = body_and_stream("<think>Never ended")
    assert body["output"] == [("reasoning", "completed", None, None, "Never ended")]


def test_sglang_25362_a_section_without_a_readable_call_is_a_message() -> None:
    body = body_and_stream(section(call("00003", '{"a": 1}')))
    assert body["output"] == [("message", "completed", None, None, '00003{"a": 1}')]


def test_vllm_50604_arguments_are_sent_as_they_are_sampled() -> None:
    with forced_server(CALLS_REPLY) as server:
        answer = server.request("POST", RESPONSES_PATH, {"input": "a", "tools": FUNCTIONS, "stream": True})
    events = parse_events(answer.body)
    check_events(events)
    deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert len(deltas) > 8
    assert "".join(deltas).endswith('{"number": 5777}')


Test = Callable[..., None]
TESTS_BY_ERROR: dict[str, tuple[Test, ...]] = {
    "reasoning not sent back": (
        test_responses.test_lost_reasoning_is_put_back,
        test_open_responses.test_a_loop_of_codex_with_40_functions_is_computed_from_the_cache_although_it_drops_reasoning,
    ),
    "closed before response.completed": (
        test_responses.test_the_stream_is_the_body_for_every_kind_of_reply,
        test_responses.test_a_failure_in_the_middle_of_a_stream_is_an_event,
        test_responses.test_a_failure_before_a_body_is_sent_is_a_503,
    ),
    "comments as keep-alives": (
        test_responses.test_the_first_events_come_before_the_prompt_is_computed_and_in_progress_is_repeated,
    ),
    "unknown tools and fields refused": (
        test_unsloth_5141_unknown_types_of_tools_and_fields_are_no_error,
        test_responses_request.test_tools_that_run_on_a_server_and_unknown_items_are_left_out_and_named,
    ),
    "thinking refused": (test_claude_code_69379_every_effort_is_accepted,),
    "a closed connection not detected": (test_responses.test_a_client_that_hangs_up_ends_its_request,),
    "404 for short prompts": (test_mlx_lm_1327_a_short_prompt_is_no_404,),
    "an index twice, an item that stays open": (
        test_responses_format.test_indexes_are_right_and_the_stream_is_the_body_for_any_groups_of_events,
    ),
    "an overflow that agents do not recognize": (
        test_responses.test_a_prompt_that_does_not_fit_is_a_status_or_a_failed_response,
    ),
    "content as a list": (test_responses_request.test_the_parts_of_a_message_are_joined,),
    "forced calls in another form, without reasoning": (
        test_open_responses.test_a_forced_call_follows_reasoning_and_has_the_models_form,
    ),
    "tool_choice none": (test_open_responses.test_with_tool_choice_none_nothing_is_called,),
    "strict refused": (test_sglang_8087_strict_functions_are_accepted,),
    "names with dots and hyphens": (test_responses_format.test_the_items_have_the_order_of_the_model,),
    "reasoning without an end": (test_sglang_23341_reasoning_that_never_ends_is_kept,),
    "a section without a readable call": (test_sglang_25362_a_section_without_a_readable_call_is_a_message,),
    "ids that are not the model's": (test_kimi_k2_128_ids_of_any_form_give_prompts_of_equal_length,),
    "arguments in one piece": (test_vllm_50604_arguments_are_sent_as_they_are_sampled,),
    "an id twice": (test_sglang_33343_a_new_call_has_a_number_that_does_not_occur,),
    "a call that is cut": (
        test_responses_format.test_a_call_that_is_cut_is_an_incomplete_item_of_an_incomplete_response,
    ),
}


def test_every_test_of_this_file_is_in_the_list() -> None:
    listed_tests = {test for tests in TESTS_BY_ERROR.values() for test in tests}
    tests = {value for name, value in globals().items() if name.startswith("test_") and callable(value)}
    assert tests - listed_tests == {test_every_test_of_this_file_is_in_the_list}
