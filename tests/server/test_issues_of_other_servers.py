"""Tests of errors that other servers had with clients of chat completions, and with Kimi K2.

A test is named after an issue or a report where the error was described. `TESTS_BY_CLIENT_ERROR` and
`TESTS_BY_MODEL_ERROR` list these tests, and tests in other files of the same errors.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest

from mlx_k2.scheduling.request import Priority
from mlx_k2.server.chat_request import read_chat_request
from mlx_k2.server.language_model import LanguageModel
from mlx_k2.server.server_state import ServerOptions
from tests.coordinator import test_constrained_replies
from tests.server import (
    test_chat_completions,
    test_chat_reply,
    test_claude_code,
    test_issues_with_messages,
    test_life_of_a_request,
    test_messages,
    test_messages_format,
    test_messages_request,
    test_turn_store,
)
from tests.server.chat_client import SUM_QUESTION, WEATHER_TOOLS
from tests.server.forced_replies import (
    CALLS_REPLY,
    REPLIES,
    REQUEST,
    TEXT_REPLY,
    TOOLS,
    USER_MESSAGES,
    builtin_tokenizer,
    forced_server,
    prompt_ids,
    reply_fields,
    streamed_reply_fields,
)
from tests.server.http_client import CHAT_PATH, receive_answer
from tests.server.in_process import LONG_PROMPT, SteppedServer, builtin_frontend, stepped_server
from tests.server.server_process import Server
from tests.text.replies import CALL_SECTION


def chunks_of(server: SteppedServer, **fields: Any) -> list[dict[str, Any]]:
    """Return the chunks of a streamed answer as they are sent."""
    return server.request("POST", CHAT_PATH, REQUEST | {"stream": True} | fields).events


def deltas_of(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [choice["delta"] for chunk in chunks for choice in chunk["choices"]]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """The built-in model's language model, without an engine."""
    return LanguageModel(builtin_frontend(), "m")


# ---- errors with clients


@pytest.mark.parametrize("mirrors", [False, True])
def test_vllm_27755_reasoning_is_sent_as_reasoning_content_and_mirrored_by_option(mirrors: bool) -> None:
    with forced_server(TEXT_REPLY, ServerOptions(mirrors_reasoning=mirrors)) as server:
        deltas = deltas_of(chunks_of(server))
        message = server.client.chat.completions.create(**REQUEST).choices[0].message.to_dict()
    for name, text in (("reasoning_content", "Short."), ("reasoning", "Short." if mirrors else "")):
        assert "".join(delta.get(name, "") for delta in deltas) == text
        assert message.get(name, "") == text
    assert not any("reasoning_details" in delta for delta in deltas)  # mlx-vlm#1408


def test_vllm_33402_reasoning_is_accepted_under_both_names(fast_server: SteppedServer) -> None:
    def prompt_after(**reasoning: str) -> list[int]:
        calls = [{"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
        turn = {"role": "assistant", "content": "", "tool_calls": calls} | reasoning
        result = {"role": "tool", "tool_call_id": "x", "content": "1"}
        return prompt_ids(fast_server, messages=[*USER_MESSAGES, turn, result])

    expected = prompt_after(reasoning_content="Why?")
    assert prompt_after(reasoning="Why?") == expected
    assert prompt_after(reasoning_content="Why?", reasoning="other") == expected
    assert prompt_after() != expected


def test_opencode_16318_missing_reasoning_is_accepted_and_put_back() -> None:
    with forced_server(f"<think>Think first.</think>I call.{CALL_SECTION}") as server:
        message: Any = server.client.chat.completions.create(**REQUEST).choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "1"}
        turn = message.to_dict()
        expected = prompt_ids(server, messages=[*USER_MESSAGES, turn, result], tools=TOOLS)
        assert turn.pop("reasoning_content") == "Think first."
        assert prompt_ids(server, messages=[*USER_MESSAGES, turn, result], tools=TOOLS) == expected


def test_zed_46794_the_request_of_zed_is_answered(fast_server: SteppedServer) -> None:
    calls = [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    body = {
        "model": "kimi",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": calls},
            {"role": "tool", "content": [{"type": "text", "text": "1"}], "tool_call_id": "call_1"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 5,
        "stop": [],
        "temperature": 1.0,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "tools": TOOLS,
        "prompt_cache_key": "k",
        "reasoning_effort": "medium",
    }
    answer = fast_server.request("POST", CHAT_PATH, body)
    assert answer.status == 200
    assert b"data: [DONE]" in answer.body


def test_zed_54872_and_opencode_43328_id_name_and_role_are_sent_once_and_never_empty() -> None:
    with forced_server(CALLS_REPLY) as server:
        chunks = chunks_of(server)
    deltas = deltas_of(chunks)
    assert [delta["role"] for delta in deltas if "role" in delta] == ["assistant"]
    assert len({chunk["id"] for chunk in chunks}) == 1  # zed#54804
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["created"] and chunk["model"] for chunk in chunks)
    num_calls = 0
    for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
        function = part["function"]
        if part["index"] == num_calls:
            num_calls += 1
            assert part["id"]
            assert part["type"] == "function"
            assert function["name"]
            assert function["arguments"] == ""
        else:
            assert part.keys() == {"index", "function"}
            assert function.keys() == {"arguments"}
    assert num_calls == 2


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": False}}])
def test_openai4j_60_without_a_request_for_usage_each_chunk_has_choices(
    fast_server: SteppedServer, options: dict[str, Any]
) -> None:
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks_of(fast_server, max_tokens=3, **options))


def test_openai4j_60_usage_is_in_the_only_chunk_without_choices(fast_server: SteppedServer) -> None:
    *chunks, last = chunks_of(fast_server, max_tokens=3, stream_options={"include_usage": True})
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)
    assert last["choices"] == []  # ATOM#1711: the field is there
    assert "usage" in last


def test_9router_1468_unknown_fields_are_ignored_at_every_level(fast_server: SteppedServer) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "e"}}], "x": [1]}
    tool = {**TOOLS[0], "defer_loading": True, "function": {**TOOLS[0]["function"], "x": 1}}
    body = {"messages": [message], "tools": [tool], "max_tokens": 1, "context_management": {"edits": []}}
    assert fast_server.request("POST", CHAT_PATH, body | {"stream_options": {"x": 1}}).status == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": {"type": "disabled"}},
        {"thinking": {"type": "enabled", "budget_tokens": 5}},
        {"thinking": {"type": "adaptive", "display": "omitted"}},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
    ids=str,
)
def test_claude_code_69379_thinking_is_never_refused(fast_server: SteppedServer, fields: dict[str, Any]) -> None:
    assert fast_server.request("POST", CHAT_PATH, {"messages": USER_MESSAGES, "max_tokens": 1} | fields).status == 200


@pytest.mark.parametrize("content", ["", "a", " ", None])
def test_mlx_lm_1327_a_short_prompt_is_no_404(fast_server: SteppedServer, content: str | None) -> None:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    assert fast_server.request("POST", CHAT_PATH, body).status == 200


def test_mlx_lm_1327_a_defect_is_a_500_and_the_next_request_works(
    fast_server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_error(*_: object) -> None:
        raise LookupError("a secret prompt")

    monkeypatch.setattr(LanguageModel, "chat", raise_error)
    answer = fast_server.request("POST", CHAT_PATH, {"messages": USER_MESSAGES})
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert b"secret" not in answer.body
    assert "secret" not in "\n".join(fast_server.lines)
    monkeypatch.undo()
    assert fast_server.request("POST", CHAT_PATH, {"messages": USER_MESSAGES, "max_tokens": 1}).status == 200


def test_open_webui_28413_a_request_for_a_title_waits_for_the_chat(model: LanguageModel) -> None:
    """The service_tier "flex", OpenAI's name for slower processing, makes a background request."""
    for tier, priority in (("flex", Priority.BACKGROUND), ("auto", Priority.INTERACTIVE), (None, Priority.INTERACTIVE)):
        chat = read_chat_request(json.dumps({"messages": USER_MESSAGES, "service_tier": tier}).encode())
        assert model.chat(chat, owner="").submissions[0].request.priority is priority
    with stepped_server(num_slots=2) as server:
        title = server.send_chat(LONG_PROMPT, stream=True, service_tier="flex", max_tokens=3)
        server.wait_for_plan()
        chat_connection = server.send_chat(stream=True, max_tokens=3)
        server.wait_for_requests(2)
        with server.running_stages():
            for connection in (chat_connection, title):
                assert b"[DONE]" in receive_answer(connection).body
    slots = [row.slot for step in server.harness.plans for row in step.rows]
    chat_rows = [index for index, slot in enumerate(slots) if slot != slots[0]]  # the title's plan was the first
    assert chat_rows == list(range(chat_rows[0], chat_rows[-1] + 1)), "a row of the title is between the chat's"


def test_ds4_333_a_prompt_sent_again_is_continued_where_its_computation_ended() -> None:
    with stepped_server() as server:
        first = server.send_chat(LONG_PROMPT, stream=True)
        server.wait_for_plan()
        server.harness.run_until(lambda: server.num_planned_tokens > 80)  # then at most two chunks of 8 are in flight
        first.close()
        server.wait_for_requests(0)
        with server.running_stages():
            usage = receive_answer(server.send_chat(LONG_PROMPT, max_tokens=1)).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 64


# ---- errors with Kimi K2


def test_vllm_kimi_k2_accuracy_the_prompt_ends_with_the_assistants_header(fast_server: SteppedServer) -> None:
    ids = prompt_ids(fast_server, messages=USER_MESSAGES)
    text = fast_server.request("POST", "/detokenize", {"tokens": ids}).json["prompt"]
    assert text.endswith("<|im_user|>user<|im_middle|>a<|im_end|><|im_assistant|>assistant<|im_middle|>")


@pytest.mark.parametrize("texts", [["a"], ["", "a"]])
def test_vllm_kimi_k2_accuracy_parts_of_content_are_joined(fast_server: SteppedServer, texts: list[str]) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]
    assert prompt_ids(fast_server, messages=messages) == prompt_ids(fast_server, messages=USER_MESSAGES)


def test_exo_2281_an_error_within_a_call_shows_no_markup() -> None:
    with forced_server(CALLS_REPLY) as server:
        server.fail_once(index=20, restarts=False)
        body = server.request("POST", CHAT_PATH, REQUEST | {"stream": True}).body
    assert b'"error"' in body
    assert b"<|" not in body


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"]
)
def test_vllm_46344_a_forced_call_is_made_in_the_models_own_form(server: Server, choice: object) -> None:
    body = {"messages": SUM_QUESTION, "tools": WEATHER_TOOLS, "temperature": 0, "tool_choice": choice}
    (reply,) = server.request("POST", CHAT_PATH, body | {"max_tokens": 100}).json["choices"]
    first_call, *_ = reply["message"]["tool_calls"]
    assert (first_call["id"], first_call["function"]["name"]) == ("functions.get_weather:0", "get_weather")
    assert reply["finish_reason"] in ("tool_calls", "length")  # the small model may write more calls than fit
    assert "<|" not in reply["message"]["content"]


def test_vllm_37397_a_literal_extra_body_is_refused(fast_server: SteppedServer) -> None:
    extra = {"chat_template_kwargs": {"thinking": False}}
    answer = fast_server.request("POST", CHAT_PATH, {"messages": USER_MESSAGES, "extra_body": extra})
    assert (answer.status, answer.error["param"]) == (400, "extra_body")


def test_vllm_43155_a_reply_with_calls_ends_with_tool_calls_and_keeps_its_reasoning() -> None:
    for name in ("calls", "calls within the reasoning"):
        with forced_server(REPLIES[name].text) as server:
            body = reply_fields(server.client)
        assert body["finish_reason"] == "tool_calls"
        assert body["reasoning"] == "Think first."


def test_vllm_46875_with_tool_choice_none_no_tool_is_declared_and_no_call_can_be_sampled(model: LanguageModel) -> None:
    body = {"messages": USER_MESSAGES, "tools": TOOLS, "tool_choice": "none"}
    generation = model.chat(read_chat_request(json.dumps(body).encode()), owner="")
    plain = model.chat(read_chat_request(json.dumps({"messages": USER_MESSAGES}).encode()), owner="")
    (submission,) = generation.submissions
    assert submission.policy is not None
    assert submission.request.prompt_ids == plain.submissions[0].request.prompt_ids
    mask = submission.policy.token_mask(())
    assert mask is not None
    special_ids = builtin_tokenizer().special_ids
    assert mask.allows(special_ids["<|im_end|>"])
    for marker in ("<|tool_calls_section_begin|>", "<|tool_call_begin|>"):
        assert not mask.allows(special_ids[marker])


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLIES)
def test_vllm_38579_draft_tokens_beside_markers_change_nothing_and_are_no_markers(name: str) -> None:
    """The prompt has the same reply in an earlier turn, so that all of its tokens could be drafted."""
    reply = REPLIES[name].text
    with forced_server(reply) as server:
        turn = server.client.chat.completions.create(**REQUEST).choices[0].message.to_dict()
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "1"} for call in turn.get("tool_calls", ())]
    messages = [*USER_MESSAGES, turn, *results, *USER_MESSAGES]
    with forced_server(reply, messages=messages) as server:
        without_drafts = reply_fields(server.client, messages=messages)
    with forced_server(reply, messages=messages, drafts=True) as server:
        assert reply_fields(server.client, messages=messages) == without_drafts
        assert streamed_reply_fields(server.client, messages=messages) == without_drafts
    drafts = {row.token_ids[0] for step in server.harness.plans for row in step.rows if row.is_draft}
    assert drafts or name == "reasoning alone"  # the template leaves out the reasoning of earlier answers
    assert drafts.isdisjoint(builtin_tokenizer().special_ids.values())


def test_vllm_54701_streams_side_by_side_do_not_mix() -> None:
    with forced_server(CALLS_REPLY) as server, ThreadPoolExecutor(4) as pool:
        body = reply_fields(server.client)
        replies = list(pool.map(lambda seed: streamed_reply_fields(server.client, seed=seed), range(4)))
    assert replies == [body] * 4


@pytest.mark.parametrize("strict", [True, False, None])
def test_sglang_8087_strict_tools_are_accepted(fast_server: SteppedServer, strict: bool | None) -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": strict}}
    body = {"messages": USER_MESSAGES, "tools": [tool], "max_tokens": 1}
    assert fast_server.request("POST", CHAT_PATH, body).status == 200


def test_sglang_23363_names_with_dots_and_hyphens_stay_whole() -> None:
    with forced_server(CALLS_REPLY) as server:
        assert [name for _, name, _ in reply_fields(server.client)["calls"]] == ["f", "mcp__a-b.c"]


def test_sglang_23341_reasoning_that_never_ends_is_kept() -> None:
    for fields, finish_reason in (({}, "stop"), ({"max_tokens": 2}, "length")):
        with forced_server(REPLIES["reasoning alone"].text) as server:
            body = reply_fields(server.client, **fields)
        assert body["reasoning"]
        assert (body["content"], body["finish_reason"]) == ("", finish_reason)


def test_dynamo_188_reasoning_may_be_opened_by_the_prompt_or_by_the_model() -> None:
    by_model = test_chat_reply.body_fields(f"<think>a</think>b{CALL_SECTION}")
    by_prompt = test_chat_reply.body_fields(f"a</think>b{CALL_SECTION}", in_reasoning=True)
    assert by_model.pop("usage") != by_prompt.pop("usage"), "the model's <think> is not counted as a token"
    assert by_model == by_prompt
    assert by_model["reasoning"] == "a"


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLIES)
def test_openrouter_420_the_finish_reason_is_sent_exactly_once(name: str) -> None:
    with forced_server(REPLIES[name].text) as server:
        chunks = chunks_of(server)
    *earlier_reasons, last_reason = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert set(earlier_reasons) == {None}
    assert last_reason == REPLIES[name].finish_reason


@pytest.mark.slow
@pytest.mark.parametrize("character", ["a", " "])
def test_cheshire_cat_1118_a_text_of_8_mib_is_refused_while_health_is_answered(
    fast_server: SteppedServer, character: str
) -> None:
    """A long run of one character is hard for a tokenizer."""
    body = {"messages": [{"role": "user", "content": character * (8 << 20)}]}
    with ThreadPoolExecutor(1) as pool:
        chat = pool.submit(fast_server.request, "POST", CHAT_PATH, body)
        while not chat.done():
            assert fast_server.request("GET", "/health").status == 200
            wait([chat], timeout=0.1)
    assert (chat.result().status, chat.result().error["code"]) == (400, "context_length_exceeded")


Test = Callable[..., None]
TESTS_BY_CLIENT_ERROR: dict[str, tuple[Test, ...]] = {
    "a hash in the system prompt": (
        test_messages_request.test_the_billing_line_is_dropped_at_the_start_of_system_only,
        test_issues_with_messages.test_claude_code_68900_a_billing_line_that_differs_leaves_the_prompt_cached,
        test_claude_code.test_a_loop_of_calls_with_40_tools_is_computed_from_the_cache_and_keeps_its_reasoning,
    ),
    "reasoning field renamed": (
        test_vllm_27755_reasoning_is_sent_as_reasoning_content_and_mirrored_by_option,
        test_vllm_33402_reasoning_is_accepted_under_both_names,
    ),
    "reasoning not sent back": (
        test_opencode_16318_missing_reasoning_is_accepted_and_put_back,
        test_turn_store.test_a_client_that_drops_reasoning_finds_its_answer_cached,
        test_messages.test_lost_reasoning_comes_back_by_conversation_or_by_signature_and_for_its_key_only,
    ),
    "a hang with reasoning_content": (test_zed_46794_the_request_of_zed_is_answered,),
    "repeated, null or empty id, name and role": (
        test_zed_54872_and_opencode_43328_id_name_and_role_are_sent_once_and_never_empty,
    ),
    "choices: []": (
        test_openai4j_60_without_a_request_for_usage_each_chunk_has_choices,
        test_openai4j_60_usage_is_in_the_only_chunk_without_choices,
    ),
    "unknown fields refused": (
        test_9router_1468_unknown_fields_are_ignored_at_every_level,
        test_messages_request.test_sampling_and_limits_are_read_and_unknown_fields_ignored_at_every_level,
        test_issues_with_messages.test_copilot_api_217_server_tools_are_left_out,
    ),
    "thinking refused": (
        test_claude_code_69379_thinking_is_never_refused,
        test_issues_with_messages.test_claude_code_69379_thinking_is_never_refused,
    ),
    "a closed connection not detected": (
        test_life_of_a_request.test_a_hang_up_in_the_queue_ends_the_request,
        test_life_of_a_request.test_a_hang_up_in_prefill_stops_the_prompt,
        test_life_of_a_request.test_a_hang_up_in_decode_ends_the_answer,
    ),
    "404 for short prompts": (
        test_mlx_lm_1327_a_short_prompt_is_no_404,
        test_mlx_lm_1327_a_defect_is_a_500_and_the_next_request_works,
    ),
    "requests for titles": (
        test_open_webui_28413_a_request_for_a_title_waits_for_the_chat,
        test_issues_with_messages.test_open_webui_28413_a_request_for_a_title_is_brief_and_an_agents_is_not,
    ),
    "inexact or slow counts of tokens": (
        test_issues_with_messages.test_lms_2055_a_count_is_exact,
        test_issues_with_messages.test_claude_relay_service_731_50_counts_at_once_do_not_wait_for_the_model,
    ),
    "a stream that differs from its body": (
        test_chat_reply.test_the_client_accumulates_the_body_for_any_groups_of_events,
        test_messages_format.test_the_client_accumulates_the_body_for_any_groups_of_events,
    ),
    "a prompt sent again": (test_ds4_333_a_prompt_sent_again_is_continued_where_its_computation_ended,),
}
TESTS_BY_MODEL_ERROR: dict[str, tuple[Test, ...]] = {
    "no header of the assistant": (test_vllm_kimi_k2_accuracy_the_prompt_ends_with_the_assistants_header,),
    "content as a list": (test_vllm_kimi_k2_accuracy_parts_of_content_are_joined,),
    "ids without separators": (test_chat_reply.test_a_name_without_its_separators_is_found_among_the_declared_tools,),
    "markup in errors": (test_exo_2281_an_error_within_a_call_shows_no_markup,),
    "forced calls in another form": (test_vllm_46344_a_forced_call_is_made_in_the_models_own_form,),
    "a literal extra_body": (test_vllm_37397_a_literal_extra_body_is_refused,),
    "calls that end with stop": (test_vllm_43155_a_reply_with_calls_ends_with_tool_calls_and_keeps_its_reasoning,),
    "tool_choice none": (
        test_vllm_46875_with_tool_choice_none_no_tool_is_declared_and_no_call_can_be_sampled,
        test_chat_completions.test_tool_choice_none_calls_no_tool,
    ),
    "draft tokens across markers": (test_vllm_38579_draft_tokens_beside_markers_change_nothing_and_are_no_markers,),
    "state shared by streams": (test_vllm_54701_streams_side_by_side_do_not_mix,),
    "two parsers": (test_chat_reply.test_the_client_accumulates_the_body_for_any_groups_of_events,),
    "strict refused": (test_sglang_8087_strict_tools_are_accepted,),
    "names with dots and hyphens": (test_sglang_23363_names_with_dots_and_hyphens_stay_whole,),
    "reasoning without an end": (test_sglang_23341_reasoning_that_never_ends_is_kept,),
    "a section without a readable call": (test_chat_reply.test_a_section_without_a_readable_call_is_content,),
    "reasoning opened by prompt or model": (test_dynamo_188_reasoning_may_be_opened_by_the_prompt_or_by_the_model,),
    "reasoning of turns with calls": (test_opencode_16318_missing_reasoning_is_accepted_and_put_back,),
    "no finish_reason": (test_openrouter_420_the_finish_reason_is_sent_exactly_once,),
    "ids that are not the model's": (
        test_chat_completions.test_ids_of_any_form_in_the_history_give_the_same_prompt,
        test_issues_with_messages.test_kimi_k2_128_ids_of_any_form_have_the_models_form_in_the_prompt,
    ),
    "arguments in one piece": (test_chat_reply.test_arguments_are_streamed_as_they_are_sampled,),
    "an id twice": (test_chat_reply.test_a_new_calls_number_is_above_all_that_occur,),
    "auto without a grammar": (
        test_constrained_replies.test_an_optional_tool_section_is_constrained_unless_the_tool_grammar_is_off,
    ),
    "a grammar without the numbers of calls": (
        test_constrained_replies.test_any_name_of_a_tool_can_be_generated,
        test_constrained_replies.test_the_number_of_a_call_follows_the_calls_of_the_prompt_unless_the_rules_have_a_first_number,
    ),
    "a call without its section": (
        test_constrained_replies.test_whatever_the_logits_required_calls_are_valid_or_the_reply_ends_with_length,
        test_constrained_replies.test_a_tool_section_that_begins_inside_the_reasoning_is_constrained,
    ),
    "two owners of the reasoning": (
        test_constrained_replies.test_reasoning_comes_before_a_required_call_and_an_answer_in_json,
        test_constrained_replies.test_the_model_may_begin_reasoning_before_a_constrained_answer,
    ),
    "a tokenizer's stack": (test_cheshire_cat_1118_a_text_of_8_mib_is_refused_while_health_is_answered,),
}


def test_every_test_of_this_file_is_in_a_list() -> None:
    rows = (*TESTS_BY_CLIENT_ERROR.values(), *TESTS_BY_MODEL_ERROR.values())
    tests = {value for name, value in globals().items() if name.startswith("test_") and callable(value)}
    assert tests - {test for row in rows for test in row} == {test_every_test_of_this_file_is_in_a_list}
    # the numbers of collected errors: no row may be lost
    assert (len(TESTS_BY_CLIENT_ERROR), len(TESTS_BY_MODEL_ERROR)) == (14, 26)
