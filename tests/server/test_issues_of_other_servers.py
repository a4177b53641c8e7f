"""Tests of defects of other servers: those that broke their clients, and those in the use of Kimi K2.

A test has the name of the issue or report that describes the defect. `CLIENTS` and `MODEL` list all of these tests.
"""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mlx_k2.scheduling.request import Priority
from mlx_k2.server.chat_request import read_chat_request
from mlx_k2.server.language_model import LanguageModel
from mlx_k2.server.server_state import ServerOptions
from mlx_k2.weights.checkpoint import describe_model
from mlx_k2.weights.model_files import read_model_files
from mlx_k2.weights.model_frontend import ModelFrontend
from mlx_k2.weights.model_source import BUILTIN, ModelSource
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
from tests.server.forced_replies import (
    REPLIES,
    TOOLS,
    USER,
    accumulate,
    body_of,
    builtin_tokenizer,
    fields_of,
    forced_server,
    prompt_of,
)
from tests.server.in_process import SteppedServer, stepped_server, stepping, wait_until
from tests.server.server_process import Server
from tests.server.test_life_of_a_request import LONG_PROMPT, send_chat
from tests.text.replies import call, section

CHAT = "/v1/chat/completions"
CALL = section(call("functions.f:0", '{"a": 1}'))


def events_of(server: SteppedServer, **fields: Any) -> list[dict[str, Any]]:
    """Return the chunks of a streamed answer as they were sent."""
    answer = server.request("POST", CHAT, {"messages": USER, "tools": TOOLS, "stream": True} | fields)
    return [json.loads(line[6:]) for line in answer.body.split(b"\n") if line.startswith(b"data: {")]


def deltas_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [choice["delta"] for event in events for choice in event["choices"]]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """The built-in model's language model, without an engine."""
    files = read_model_files(ModelSource(path_or_repo=BUILTIN)).files
    return LanguageModel(ModelFrontend(describe_model(files, BUILTIN), 4000), "m")


@pytest.fixture(scope="module")
def ready_server() -> Iterator[SteppedServer]:
    """A server that answers at once with random tokens."""
    with stepped_server(num_slots=4, chunk_tokens=512) as server, stepping(server):
        yield server


# ---- what broke clients


@pytest.mark.parametrize("mirrors", [False, True])
def test_vllm_27755_reasoning_is_sent_as_reasoning_content_and_mirrored_by_option(mirrors: bool) -> None:
    with (
        forced_server(REPLIES["text"][0], ServerOptions(mirrors_reasoning=mirrors)) as (server, client, _),
        stepping(server),
    ):
        deltas = deltas_of(events_of(server))
        message = client.chat.completions.create(model="m", messages=USER, tools=TOOLS).choices[0].message.to_dict()
    for name, sent in (("reasoning_content", "Short."), ("reasoning", "Short." if mirrors else "")):
        assert "".join(delta.get(name, "") for delta in deltas) == sent
        assert message.get(name, "") == sent
    assert not any("reasoning_details" in delta for delta in deltas)  # mlx-vlm#1408


def test_vllm_33402_reasoning_is_accepted_under_both_names(ready_server: SteppedServer) -> None:
    def follow_up(**reasoning: str) -> list[int]:
        calls = [{"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
        turn = {"role": "assistant", "content": "", "tool_calls": calls} | reasoning
        return prompt_of(ready_server, messages=[*USER, turn, {"role": "tool", "tool_call_id": "x", "content": "1"}])

    as_content = follow_up(reasoning_content="Why?")
    assert as_content == follow_up(reasoning="Why?") == follow_up(reasoning_content="Why?", reasoning="other")
    assert as_content != follow_up()


def test_opencode_16318_missing_reasoning_is_accepted_and_put_back() -> None:
    reply = f"<think>Think first.</think>I call.{CALL}"
    with forced_server(reply) as (server, client, _), stepping(server):
        message: Any = client.chat.completions.create(model="m", messages=USER, tools=TOOLS).choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "1"}
        sent = message.to_dict()
        assert sent["reasoning_content"] == "Think first."
        without_reasoning = {name: value for name, value in sent.items() if name != "reasoning_content"}
        prompts = [prompt_of(server, messages=[*USER, turn, result], tools=TOOLS) for turn in (sent, without_reasoning)]
    assert prompts[0] == prompts[1]


def test_zed_46794_the_request_of_zed_is_answered(ready_server: SteppedServer) -> None:
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
    answer = ready_server.request("POST", CHAT, body)
    assert answer.status == 200
    assert b"data: [DONE]" in answer.body


def test_zed_54872_and_opencode_43328_id_name_and_role_are_sent_once_and_never_empty() -> None:
    with forced_server(REPLIES["calls"][0]) as (server, _, _), stepping(server):
        events = events_of(server)
    deltas = deltas_of(events)
    assert [delta["role"] for delta in deltas if "role" in delta] == ["assistant"]
    assert len({event["id"] for event in events}) == 1  # zed#54804
    assert all(event["object"] == "chat.completion.chunk" and event["created"] and event["model"] for event in events)
    started: set[int] = set()
    for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
        function = part["function"]
        if part["index"] in started:
            assert part.keys() == {"index", "function"}
            assert function.keys() == {"arguments"}
        else:
            started.add(part["index"])
            assert part["id"]
            assert part["type"] == "function"
            assert function["name"]
            assert function["arguments"] == ""
    assert started == {0, 1}


@pytest.mark.parametrize("include_usage", [None, False, True])
def test_openai4j_60_a_chunk_without_choices_comes_only_when_usage_is_asked_for(
    ready_server: SteppedServer, include_usage: bool | None
) -> None:
    options = {} if include_usage is None else {"stream_options": {"include_usage": include_usage}}
    events = events_of(ready_server, max_tokens=3, **options)
    assert all("choices" in event for event in events)  # ATOM#1711
    empty = [event for event in events if not event["choices"]]
    assert [("usage" in event) for event in empty] == ([True] if include_usage else [])
    assert not any("usage" in event for event in events if event["choices"])


def test_9router_1468_unknown_fields_are_ignored_at_every_level(ready_server: SteppedServer) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "e"}}], "x": [1]}
    tool = {**TOOLS[0], "defer_loading": True, "function": {**TOOLS[0]["function"], "x": 1}}
    body = {"messages": [message], "tools": [tool], "max_tokens": 1, "context_management": {"edits": []}}
    assert ready_server.request("POST", CHAT, body | {"stream_options": {"x": 1}}).status == 200


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
def test_claude_code_69379_thinking_is_never_refused(ready_server: SteppedServer, fields: dict[str, Any]) -> None:
    assert ready_server.request("POST", CHAT, {"messages": USER, "max_tokens": 1} | fields).status == 200


@pytest.mark.parametrize("content", ["", "a", " ", None])
def test_mlx_lm_1327_a_short_prompt_is_no_404(ready_server: SteppedServer, content: str | None) -> None:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    assert ready_server.request("POST", CHAT, body).status == 200


def test_mlx_lm_1327_a_defect_is_a_500_and_the_next_request_works(
    ready_server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise LookupError("a secret prompt")

    monkeypatch.setattr(LanguageModel, "chat", broken)
    answer = ready_server.request("POST", CHAT, {"messages": USER})
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert b"secret" not in answer.body
    assert "secret" not in "\n".join(ready_server.lines)
    monkeypatch.undo()
    assert ready_server.request("POST", CHAT, {"messages": USER, "max_tokens": 1}).status == 200


def test_open_webui_28413_a_request_for_a_title_waits_for_the_chat(model: LanguageModel) -> None:
    """service_tier flex, OpenAI's word for slower processing, makes a background request."""
    for tier, priority in (("flex", Priority.BACKGROUND), ("auto", Priority.INTERACTIVE), (None, Priority.INTERACTIVE)):
        chat = read_chat_request(json.dumps({"messages": USER, "service_tier": tier}).encode())
        assert model.chat(chat, "").submissions[0].request.priority is priority
    with stepped_server(num_slots=2) as server:
        title = send_chat(server, LONG_PROMPT, stream=True, service_tier="flex", max_tokens=3)
        wait_until(lambda: bool(server.tokens.plans), "the title begins")
        chat_stream = send_chat(server, stream=True, max_tokens=3)
        wait_until(lambda: server.num_used == 2, "the chat is there")
        with stepping(server):
            received = b""
            while part := chat_stream.recv(65536):
                received += part
            assert b"[DONE]" in received
            while title.recv(65536):
                pass
        title.close()
        chat_stream.close()
    long_rows = [len(row.token_ids) for step in server.tokens.plans for row in step.rows]
    assert sum(long_rows) > 180, "the title was computed, too"


def test_ds4_333_a_prompt_sent_again_goes_on_from_what_was_computed() -> None:
    with stepped_server() as server:
        first = send_chat(server, LONG_PROMPT, stream=True)
        wait_until(lambda: bool(server.tokens.plans), "the prompt begins")
        server.tokens.run(lambda: sum(len(row.token_ids) for step in server.tokens.plans for row in step.rows) > 80)
        first.close()
        wait_until(lambda: server.num_used == 0, "the request is gone")
        with stepping(server):
            body = {"messages": [{"role": "user", "content": LONG_PROMPT}], "max_tokens": 1}
            usage = server.request("POST", CHAT, body).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 64


# ---- what was wrong with Kimi K2


def test_vllm_kimi_k2_accuracy_the_prompt_ends_with_the_assistants_header(ready_server: SteppedServer) -> None:
    tokens = prompt_of(ready_server, messages=USER)
    text = ready_server.request("POST", "/detokenize", {"tokens": tokens}).json["prompt"]
    assert text.endswith("<|im_user|>user<|im_middle|>a<|im_end|><|im_assistant|>assistant<|im_middle|>")


@pytest.mark.parametrize("content", [[{"type": "text", "text": "a"}], [{"type": "text", "text": ""}, {"text": "a"}]])
def test_vllm_kimi_k2_accuracy_parts_of_content_are_joined(ready_server: SteppedServer, content: list[Any]) -> None:
    content = [{"type": "text"} | part for part in content]
    messages = [{"role": "user", "content": content}]
    assert prompt_of(ready_server, messages=messages) == prompt_of(ready_server, messages=USER)


def test_exo_2281_an_error_within_a_call_shows_no_markup() -> None:
    with forced_server(REPLIES["calls"][0]) as (server, _, stages), stepping(server):
        stages.fail_at = 20
        server.tokens.cancel()
        sent = server.request("POST", CHAT, {"messages": USER, "tools": TOOLS, "stream": True}).body
    assert b'"error"' in sent
    assert b"<|" not in sent


@pytest.mark.parametrize(
    "tool_choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"]
)
def test_vllm_46344_a_forced_call_is_made_in_the_models_own_form(server: Server, tool_choice: object) -> None:
    body = {"messages": test_chat_completions.QUESTION, "tools": test_chat_completions.WEATHER, "temperature": 0}
    (choice,) = server.request("POST", CHAT, body | {"tool_choice": tool_choice, "max_tokens": 100}).json["choices"]
    (first_call, *_) = choice["message"]["tool_calls"]
    assert (first_call["id"], first_call["function"]["name"]) == ("functions.get_weather:0", "get_weather")
    assert choice["finish_reason"] in ("tool_calls", "length")
    assert "<|" not in choice["message"]["content"]


def test_vllm_37397_a_literal_extra_body_is_refused(ready_server: SteppedServer) -> None:
    extra = {"chat_template_kwargs": {"thinking": False}}
    answer = ready_server.request("POST", CHAT, {"messages": USER, "extra_body": extra})
    assert (answer.status, answer.error["param"]) == (400, "extra_body")


def test_vllm_43155_a_reply_with_calls_ends_with_tool_calls_and_keeps_its_reasoning() -> None:
    for name in ("calls", "calls within the reasoning"):
        with forced_server(REPLIES[name][0]) as (server, client, _), stepping(server):
            body = body_of(client)
        assert body["finish_reason"] == "tool_calls"
        assert body["reasoning"] == "Think first."


def test_vllm_46875_with_tool_choice_none_no_tool_is_declared_and_no_call_can_be_sampled(model: LanguageModel) -> None:
    body = {"messages": USER, "tools": TOOLS, "tool_choice": "none"}
    generation = model.chat(read_chat_request(json.dumps(body).encode()), "")
    plain = model.chat(read_chat_request(json.dumps({"messages": USER}).encode()), "")
    (submission,) = generation.submissions
    assert submission.policy is not None
    assert submission.request.prompt_ids == plain.submissions[0].request.prompt_ids
    mask = submission.policy.token_mask(())
    assert mask is not None
    special = builtin_tokenizer().special_ids
    banned = {"<|tool_calls_section_begin|>": False, "<|tool_call_begin|>": False, "<|im_end|>": True}
    assert {name: mask.allows(special[name]) for name in banned} == banned


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLIES)
def test_vllm_38579_draft_tokens_that_cross_markers_change_nothing(name: str) -> None:
    """The reply is repeated, so that the drafter proposes its markers."""
    reply = REPLIES[name][0]
    history: list[Any] = [*USER]
    with forced_server(reply) as (server, client, _), stepping(server):
        without = fields_of(client.chat.completions.create(model="m", messages=history, tools=TOOLS).to_dict())
    with forced_server(reply, drafts=True) as (server, client, _), stepping(server):
        for _ in range(2):
            assert body_of(client) == without
            assert accumulate(client) == without


def test_vllm_54701_streams_side_by_side_do_not_mix() -> None:
    with forced_server(REPLIES["calls"][0]) as (server, client, _), stepping(server):
        body = body_of(client)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda seed: accumulate(client, seed=seed), range(4))) == [body] * 4


@pytest.mark.parametrize("strict", [True, False, None])
def test_sglang_8087_strict_tools_are_accepted(ready_server: SteppedServer, strict: bool | None) -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": strict}}
    assert ready_server.request("POST", CHAT, {"messages": USER, "tools": [tool], "max_tokens": 1}).status == 200


def test_sglang_23363_names_with_dots_and_hyphens_stay_whole() -> None:
    with forced_server(REPLIES["calls"][0]) as (server, client, _), stepping(server):
        assert [name for _, name, _ in body_of(client)["calls"]] == ["f", "mcp__a-b.c"]


def test_sglang_23341_reasoning_that_never_ends_is_kept() -> None:
    for fields, finish_reason in (({}, "stop"), ({"max_tokens": 2}, "length")):
        with forced_server(REPLIES["reasoning alone"][0]) as (server, client, _), stepping(server):
            body = body_of(client, **fields)
        assert body["reasoning"]
        assert (body["content"], body["finish_reason"]) == ("", finish_reason)


def test_dynamo_188_reasoning_may_be_opened_by_the_prompt_or_by_the_model() -> None:
    by_model = test_chat_reply.fields_for_text(f"<think>a</think>b{CALL}")
    by_prompt = test_chat_reply.fields_for_text(f"a</think>b{CALL}", in_reasoning=True)
    assert by_model | {"usage": {}} == by_prompt | {"usage": {}}
    assert by_model["reasoning"] == "a"


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLIES)
def test_openrouter_420_the_finish_reason_is_sent_exactly_once(name: str) -> None:
    with forced_server(REPLIES[name][0]) as (server, _, _), stepping(server):
        events = events_of(server)
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert reasons[-1] == REPLIES[name][1]
    assert set(reasons[:-1]) == {None}


@pytest.mark.slow
def test_cheshire_cat_1118_a_text_of_8_mb_ends_nothing(ready_server: SteppedServer) -> None:
    """One run of one character, and one of spaces: both are hard for a tokenizer. /health answers meanwhile."""
    for text in ("a" * (8 << 20), " " * (8 << 20)):
        body = {"messages": [{"role": "user", "content": text}]}
        answers: list[Any] = []
        sending = threading.Thread(target=lambda: answers.append(ready_server.request("POST", CHAT, body)))  # noqa: B023
        sending.start()
        while sending.is_alive():
            assert ready_server.request("GET", "/health").status == 200
            sending.join(0.1)
        assert (answers[0].status, answers[0].error["code"]) == (400, "context_length_exceeded")


Test = Callable[..., None]
CLIENTS: dict[str, tuple[Test, ...]] = {
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
        test_turn_store.test_a_client_that_drops_reasoning_finds_the_whole_answer_cached,
        test_messages.test_lost_reasoning_comes_back_by_conversation_or_by_signature_and_for_its_key_only,
    ),
    "a hang with reasoning_content": (test_zed_46794_the_request_of_zed_is_answered,),
    "repeated, null or empty id, name and role": (
        test_zed_54872_and_opencode_43328_id_name_and_role_are_sent_once_and_never_empty,
    ),
    "choices: []": (test_openai4j_60_a_chunk_without_choices_comes_only_when_usage_is_asked_for,),
    "unknown fields refused": (
        test_9router_1468_unknown_fields_are_ignored_at_every_level,
        test_messages_request.test_sampling_and_limits_are_read_and_unknown_fields_ignored_at_every_level,
        test_issues_with_messages.test_copilot_api_217_server_tools_are_left_out,
    ),
    "thinking refused": (
        test_claude_code_69379_thinking_is_never_refused,
        test_issues_with_messages.test_claude_code_69379_thinking_is_never_refused,
    ),
    "a disconnect not noticed": (
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
        test_issues_with_messages.test_open_webui_28413_a_title_is_a_brief_request_and_an_agents_is_not,
    ),
    "count_tokens": (
        test_issues_with_messages.test_lms_2055_a_count_is_exact,
        test_issues_with_messages.test_claude_relay_service_731_50_counts_at_once_do_not_wait_for_the_model,
    ),
    "an adapter that disagrees with its body": (
        test_chat_reply.test_the_client_accumulates_the_body_from_any_cut_of_the_stream,
        test_messages_format.test_the_client_accumulates_the_body_from_any_cut_of_the_stream,
    ),
    "a prompt sent again": (test_ds4_333_a_prompt_sent_again_goes_on_from_what_was_computed,),
}
MODEL: dict[str, tuple[Test, ...]] = {
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
    "draft tokens across markers": (test_vllm_38579_draft_tokens_that_cross_markers_change_nothing,),
    "state shared by streams": (test_vllm_54701_streams_side_by_side_do_not_mix,),
    "two parsers": (test_chat_reply.test_the_client_accumulates_the_body_from_any_cut_of_the_stream,),
    "strict": (test_sglang_8087_strict_tools_are_accepted,),
    "names": (test_sglang_23363_names_with_dots_and_hyphens_stay_whole,),
    "reasoning without an end": (test_sglang_23341_reasoning_that_never_ends_is_kept,),
    "a section without a readable call": (
        test_chat_reply.test_a_section_without_a_readable_call_is_content_and_never_nothing,
    ),
    "who opens the reasoning": (test_dynamo_188_reasoning_may_be_opened_by_the_prompt_or_by_the_model,),
    "reasoning of turns with calls": (test_opencode_16318_missing_reasoning_is_accepted_and_put_back,),
    "no finish_reason": (test_openrouter_420_the_finish_reason_is_sent_exactly_once,),
    "ids that are not the model's": (
        test_chat_completions.test_ids_of_any_form_in_the_history_give_the_same_prompt,
        test_issues_with_messages.test_kimi_k2_128_ids_of_any_form_are_written_as_the_model_knows_them,
    ),
    "arguments in one piece": (test_chat_reply.test_arguments_are_streamed_as_they_are_sampled,),
    "an id twice": (test_chat_reply.test_a_new_calls_number_is_above_all_that_occur,),
    "auto without a grammar": (
        test_constrained_replies.test_a_section_that_the_model_opens_itself_is_constrained_unless_that_is_turned_off,
    ),
    "a grammar without the numbers of calls": (
        test_constrained_replies.test_any_name_of_a_tool_can_be_written,
        test_constrained_replies.test_the_number_of_a_call_continues_those_of_the_prompt,
    ),
    "a call without its section": (
        test_constrained_replies.test_whatever_the_logits_required_calls_are_valid_or_the_reply_ends_with_length,
        test_constrained_replies.test_a_section_that_begins_inside_the_reasoning_is_constrained,
    ),
    "two owners of the reasoning": (
        test_constrained_replies.test_reasoning_comes_before_a_required_call_and_an_answer_in_json,
        test_constrained_replies.test_a_model_that_opens_its_reasoning_itself_may_do_so_before_a_constrained_answer,
    ),
    "a tokenizer's stack": (test_cheshire_cat_1118_a_text_of_8_mb_ends_nothing,),
}


def test_every_test_of_this_file_is_in_a_list() -> None:
    listed = {test for tests in (*CLIENTS.values(), *MODEL.values()) for test in tests}
    here = {item for name, item in globals().items() if name.startswith("test_") and callable(item)}
    assert here - listed == {test_every_test_of_this_file_is_in_a_list}
    assert (len(CLIENTS), len(MODEL)) == (14, 26)
