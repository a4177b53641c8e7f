"""Tests of defects of other servers that broke clients of the Responses API, or that occurred with Kimi K2.

A test has the name of the issue that describes the defect. `ROWS` lists these tests and those of other files.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlx_k2.server.chat_request import EFFORT_TOKENS
from tests.server import test_open_responses, test_responses, test_responses_format, test_responses_request
from tests.server.forced_replies import REPLIES, USER, forced_server
from tests.server.in_process import SteppedServer, stepped_server, stepping
from tests.server.responses_events import FUNCTIONS, check_events, events_of, fields_of, without_chunks
from tests.server.test_responses_format import body_for_text
from tests.text.replies import call, section

PATH = "/v1/responses"


@pytest.fixture(scope="module")
def ready_server() -> Iterator[SteppedServer]:
    """A server that answers at once with random tokens."""
    with stepped_server(num_slots=4, chunk_tokens=512) as server, stepping(server):
        yield server


def num_prompt_tokens(server: SteppedServer, items: list[Any]) -> int:
    body = {"input": items, "tools": FUNCTIONS, "max_output_tokens": 1, "store": False}
    answer = server.request("POST", PATH, body)
    assert answer.status == 200, answer.body
    return int(answer.json["usage"]["input_tokens"])


@pytest.mark.parametrize("kind", ["custom", "web_search", "local_shell", "namespace", "mcp", "image_generation", "x"])
def test_unsloth_5141_tools_of_other_types_and_unknown_fields_are_no_error(
    ready_server: SteppedServer, kind: str
) -> None:
    tool = {"type": kind, "name": "t", "x": [1]}
    message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a", "x": 1}], "x": {}}
    body = {"input": [message], "tools": [tool, FUNCTIONS[0] | {"defer_loading": True}], "client_metadata": {"x": 1}}
    assert ready_server.request("POST", PATH, body | {"max_output_tokens": 1}).status == 200


@pytest.mark.parametrize("effort", EFFORT_TOKENS)
def test_claude_code_69379_no_effort_is_refused(ready_server: SteppedServer, effort: str) -> None:
    body = {"input": "a", "reasoning": {"effort": effort, "summary": "detailed"}, "max_output_tokens": 1}
    assert ready_server.request("POST", PATH, body).status == 200


@pytest.mark.parametrize("text", ["", "a", " "])
def test_mlx_lm_1327_a_short_prompt_is_no_404(ready_server: SteppedServer, text: str) -> None:
    assert ready_server.request("POST", PATH, {"input": text, "max_output_tokens": 1}).status == 200


@pytest.mark.parametrize("strict", [True, False, None])
def test_sglang_8087_strict_functions_are_accepted(ready_server: SteppedServer, strict: bool | None) -> None:
    body = {"input": "a", "tools": [FUNCTIONS[0] | {"strict": strict}], "max_output_tokens": 1}
    assert ready_server.request("POST", PATH, body).status == 200


@pytest.mark.parametrize("ids", [("functions.f:0", "functions.f:1"), ("call_x", "call_y"), ("same", "same")])
def test_kimi_k2_128_call_ids_of_any_form_give_the_same_prompt(
    ready_server: SteppedServer, ids: tuple[str, str]
) -> None:
    def items(*ids: str) -> list[Any]:
        calls = [{"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}"} for call_id in ids]
        outputs = [{"type": "function_call_output", "call_id": call_id, "output": "1"} for call_id in ids]
        return [*USER, *calls, *outputs]

    usual = num_prompt_tokens(ready_server, items("functions.f:0", "functions.f:1"))
    assert num_prompt_tokens(ready_server, items(*ids)) == usual


def test_sglang_33343_a_new_call_has_a_number_that_does_not_occur() -> None:
    """The client has cut off the beginning of its history."""
    history = [
        {"type": "function_call", "call_id": "functions.f:80", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "functions.f:80", "output": "1"},
    ]
    calls = [{"id": "functions.f:80", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    messages = [*USER, turn, {"role": "tool", "tool_call_id": "functions.f:80", "content": "1"}]
    numbered = section(call("functions.f:81", "{}"), call("functions.mcp__a-b.c:82", "{}"))
    with forced_server(f"<think></think>{numbered}", messages=messages) as (server, client, _), stepping(server):
        made = client.responses.create(model="m", input=[*USER, *history], tools=FUNCTIONS)  # type: ignore[list-item]
    assert [item.call_id for item in made.output if item.type == "function_call"] == [
        "functions.f:81",
        "functions.mcp__a-b.c:82",
    ]


def test_sglang_23341_reasoning_that_never_ends_is_kept() -> None:
    body = fields_of(body_for_text("<think>Never ended"))
    assert body["output"] == [("reasoning", "completed", None, None, "Never ended")]


def test_sglang_25362_a_section_without_a_readable_call_is_a_message_and_never_nothing() -> None:
    body = fields_of(body_for_text(section(call("00003", '{"a": 1}'))))
    assert body["output"] == [("message", "completed", None, None, '00003{"a": 1}')]


def test_vllm_50604_arguments_are_sent_as_they_are_sampled() -> None:
    with forced_server(REPLIES["calls"][0]) as (server, _, _), stepping(server):
        answer = server.request("POST", PATH, {"input": "a", "tools": FUNCTIONS, "stream": True})
    events = events_of(without_chunks(answer.body))
    check_events(events)
    deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert len(deltas) > 8
    assert json.loads("[" + "".join(deltas).replace("}{", "},{") + "]")[1] == {"number": 5777}


Test = Callable[..., None]
ROWS: dict[str, tuple[Test, ...]] = {
    "reasoning not sent back": (
        test_responses.test_lost_reasoning_is_put_back,
        test_open_responses.test_codex_with_40_tools_and_a_loop_of_calls_is_computed_from_the_cache_without_reasoning,
    ),
    "closed before response.completed": (
        test_responses.test_the_stream_is_the_body_for_every_kind_of_reply,
        test_responses.test_a_failure_in_the_middle_is_an_event_or_a_status,
    ),
    "comments as signs of life": (
        test_responses.test_the_first_events_come_before_the_prompt_is_computed_and_in_progress_is_repeated,
    ),
    "unknown tools and fields refused": (
        test_unsloth_5141_tools_of_other_types_and_unknown_fields_are_no_error,
        test_responses_request.test_tools_that_run_on_a_server_and_unknown_items_are_left_out_and_named,
    ),
    "thinking refused": (test_claude_code_69379_no_effort_is_refused,),
    "a disconnect not noticed": (test_responses.test_a_client_that_hangs_up_ends_its_request,),
    "404 for short prompts": (test_mlx_lm_1327_a_short_prompt_is_no_404,),
    "an index twice, an item that stays open": (
        test_responses_format.test_indexes_are_right_and_the_stream_is_the_body_for_any_text_and_any_cut,
    ),
    "an overflow that agents do not recognize": (
        test_responses.test_a_prompt_that_does_not_fit_is_a_status_or_a_failed_response,
    ),
    "content as a list": (test_responses_request.test_the_parts_of_a_message_are_joined,),
    "forced calls in another form, without reasoning": (
        test_open_responses.test_a_forced_call_keeps_its_reasoning_and_the_model_s_form,
    ),
    "tool_choice none": (test_open_responses.test_with_tool_choice_none_nothing_is_called,),
    "strict": (test_sglang_8087_strict_functions_are_accepted,),
    "names": (test_responses_format.test_each_kind_of_item_follows_the_order_of_the_model,),
    "reasoning without an end": (test_sglang_23341_reasoning_that_never_ends_is_kept,),
    "a section without a readable call": (
        test_sglang_25362_a_section_without_a_readable_call_is_a_message_and_never_nothing,
    ),
    "ids that are not the model's": (test_kimi_k2_128_call_ids_of_any_form_give_the_same_prompt,),
    "arguments in one piece": (test_vllm_50604_arguments_are_sent_as_they_are_sampled,),
    "an id twice": (test_sglang_33343_a_new_call_has_a_number_that_does_not_occur,),
    "a call that is cut": (
        test_responses_format.test_a_call_that_is_cut_is_an_incomplete_item_of_an_incomplete_response,
    ),
}


def test_every_test_of_this_file_is_in_the_list() -> None:
    listed = {test for tests in ROWS.values() for test in tests}
    here = {found for name, found in globals().items() if name.startswith("test_") and callable(found)}
    assert here - listed == {test_every_test_of_this_file_is_in_the_list}
