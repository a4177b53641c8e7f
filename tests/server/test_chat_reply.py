"""Tests of replies as chat completions: what the official client accumulates, for any cut of the stream."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.handle import Event, Finished, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.coordinator.reply_policy import ReplyLimits, ReplyPolicy
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.server.chat_completions import ChatFormat
from mlx_k2.server.chat_reply import ChatReply, declared_name
from mlx_k2.server.chat_request import ChatRequest
from mlx_k2.server.language_model import Generation, next_call_number
from mlx_k2.server.request_fields import StreamOptions
from mlx_k2.server.server_state import ServerOptions
from mlx_k2.server.sse import ReplyFormat
from tests.text.fixtures import tokenizer
from tests.text.replies import call, section, tokens_of

PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "Hello ",
        " wörld ☃",
        "\n\n",
        section(call("functions.f:0", '{"a": "ö"}')),
        section(call("functions.f:0", "{}"), call("functions.g-h.i:1", '{"b": [1, 2]}')),
        section(call("functions.f:0", "")),
        section(call("functions.f:0", '{"broken')),
        section(call("", '{"a": 1}')),
        section("<|tool_call_begin|>functions.f:0<|tool_call_end|>"),
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{",
        "stop here",
        "<|im_middle|>",
    ]
)
NAMES = ("f", "g-h.i")


def token_ids(text: str) -> list[int]:
    """Return the tokens of a reply, with each marker as its control token."""
    ids: list[int] = []
    for piece, is_control in tokens_of(text):
        ids += [tokenizer().special_ids[piece]] if is_control else tokenizer().encode_text(piece)
    return ids


def generation_of(stop_strings: tuple[str, ...] = (), first_call: int = 0, in_reasoning: bool = False) -> Generation:
    prompt = (tokenizer().special_ids["<think>"],) if in_reasoning else (5,)
    request = Request(prompt, 1000, Sampling(seed=0), tokenizer().stop_ids)
    policy = ReplyPolicy(tokenizer(), request, ReplyLimits(stop_strings))
    return Generation((Submission(request, policy),), tokenizer(), in_reasoning, first_call, NAMES)


def events_of(generation: Generation, ids: Sequence[int], reason: FinishReason = FinishReason.LENGTH) -> list[Event]:
    """Return the engine's events for a reply's tokens, and the end for ``reason`` if no stop string ends it before."""
    events: list[Event] = []
    policy = generation.submissions[0].policy
    assert policy is not None
    for token_id in ids:
        accepted = policy.accept(token_id)
        events.append(Token(token_id, accepted.text, accepted.parts, logprob=-0.5))
        if accepted.finish_reason is not None:
            reason = accepted.finish_reason
            break
    num_tokens = len(events)
    summary = AnswerSummary(
        prompt_tokens=3,
        cached_tokens=1,
        generated_tokens=num_tokens,
        finish_reason=reason,
        seed=0,
        time_to_first_token_s=None,
        prefill_tokens_per_s=None,
        decode_tokens_per_s=None,
    )
    return [*events, Finished(summary, policy.finish().parts)]


def body_of(generation: Generation, events: Sequence[Event]) -> dict[str, Any]:
    reply = ChatReply(generation)
    for event in events:
        reply.add(event)
    return format_of(reply).body()


def format_of(reply: ChatReply) -> ChatFormat:
    request = ChatRequest(messages=[], logprobs=True, stream_options=StreamOptions(include_usage=True))
    common_fields = {"id": "chatcmpl-1", "created": 1, "model": "m"}
    return ChatFormat(common_fields, [reply], request, ServerOptions(keepalive="chunk"))


def stream_of(reply_format: ReplyFormat, events: Sequence[Event], cuts: Sequence[int]) -> bytes:
    """Return the stream if the events are read in groups of ``cuts``, with a keep-alive before each group."""
    stream, remaining, sizes = reply_format.begin(), [(0, event) for event in events], list(cuts)
    while remaining:
        size = sizes.pop(0) if sizes else len(remaining)
        stream += reply_format.keepalive() + reply_format.events(remaining[:size])
        remaining = remaining[size:]
    return stream


def accumulate(generation: Generation, events: list[Event], cuts: Sequence[int]) -> dict[str, Any]:
    """Return the body that the official client accumulates if the events are read in groups of ``cuts``."""
    stream = stream_of(format_of(ChatReply(generation)), events, cuts)
    *lines, done = [line for line in stream.decode().split("\n\n") if line]
    assert done == "data: [DONE]"
    state = ChatCompletionStreamState()
    for line in lines:
        state.handle_chunk(ChatCompletionChunk.model_validate(json.loads(line.removeprefix("data: "))))
    snapshot = state.current_completion_snapshot.to_dict()
    usage = json.loads(lines[-1].removeprefix("data: "))["usage"]
    return {**snapshot, "usage": usage}


def fields_of(body: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a body that the client's accumulator has, too."""
    (choice,) = body["choices"]
    message = choice["message"]
    calls = [
        (call["id"], call["type"], call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls") or ()
    ]
    logprobs = (choice.get("logprobs") or {}).get("content") or []
    return {
        "role": message["role"],
        "content": message.get("content") or "",
        "reasoning": message.get("reasoning_content") or "",
        "calls": calls,
        "finish_reason": choice["finish_reason"],
        "logprobs": [entry["token"] for entry in logprobs],
        "usage": body["usage"],
    }


@given(
    st.lists(PIECES, max_size=6),
    st.lists(st.integers(1, 7), max_size=8),
    st.booleans(),
    st.sampled_from([(), ("stop",), ("world", "here")]),
)
def test_the_client_accumulates_the_body_from_any_cut_of_the_stream(
    pieces: list[str], cuts: list[int], in_reasoning: bool, stop_strings: tuple[str, ...]
) -> None:
    ids = token_ids("".join(pieces))
    whole, cut = (generation_of(stop_strings, 3, in_reasoning) for _ in range(2))
    body = body_of(whole, events_of(whole, ids))
    assert fields_of(accumulate(cut, events_of(cut, ids), cuts)) == fields_of(body)


def fields_for_text(text: str, **options: Any) -> dict[str, Any]:
    generation = generation_of(**options)
    reason = FinishReason.STOP if text.endswith("<|tool_calls_section_end|>") else FinishReason.LENGTH
    return fields_of(body_of(generation, events_of(generation, token_ids(text), reason)))


def test_calls_are_numbered_on_from_the_conversation() -> None:
    fields = fields_for_text(section(call("functions.f:0", "{}"), call("call_x", "{}")), first_call=4)
    assert fields["calls"][0][0] == "functions.f:4"
    assert fields["finish_reason"] == "tool_calls"


def test_a_call_without_arguments_has_an_empty_object() -> None:
    assert fields_for_text(section(call("functions.f:0", "")))["calls"] == [("functions.f:0", "function", "f", "{}")]


def test_arguments_stay_the_text_that_the_model_wrote() -> None:
    arguments = '{"zip": "5777", "x": 1.0,  "y": [ ]}'
    assert fields_for_text(section(call("functions.f:0", arguments)))["calls"][0][3] == arguments


@pytest.mark.parametrize("header", ["functionsf", "functionsf5", "functions.f:0", "f:7", "f"])
def test_a_name_without_its_separators_is_found_among_the_declared_tools(header: str) -> None:
    assert fields_for_text(section(call(header, "{}")))["calls"][0][2] == "f"


@pytest.mark.parametrize(
    ("sampled_name", "expected"),
    [
        ("write_file_v2", "write_file_v2"),
        ("functionswrite_file3", "write_file"),
        ("functions_write_file:3", "write_file"),
        ("write_file2", "write_file2"),
        ("functions.write_file2:1", "write_file2"),
        ("rewrite_file", "rewrite_file"),
        ("functionsexec5", "functionsexec5"),
    ],
)
def test_a_name_becomes_the_longest_tool_it_stands_for_or_stays(sampled_name: str, expected: str) -> None:
    assert declared_name(sampled_name, ("write_file", "write_file2", "read")) == expected


def test_a_cancelled_reply_with_an_open_call_ends_with_length() -> None:
    generation = generation_of()
    text = "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"
    *events, end = events_of(generation, token_ids(text), FinishReason.CANCELLED)
    assert isinstance(end, Finished)
    body = body_of(generation, [*events, Finished(end.summary)])
    assert body["choices"][0]["finish_reason"] == "length"


def test_a_section_without_a_readable_call_is_content_and_never_nothing() -> None:
    fields = fields_for_text(section(call("00003", '{"a": 1}')))
    assert fields["calls"] == []
    assert fields["content"] == '00003{"a": 1}'
    assert fields["finish_reason"] == "stop"


def test_a_call_that_max_tokens_cuts_ends_with_length() -> None:
    cut = "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"
    fields = fields_for_text(cut)
    assert fields["calls"] == [("functions.f:0", "function", "f", "{")]
    assert fields["finish_reason"] == "length"


def test_arguments_are_streamed_as_they_are_sampled() -> None:
    generation = generation_of()
    events = events_of(generation, token_ids(section(call("functions.f:0", '{"path": "a", "text": "one two"}'))))
    reply = ChatReply(generation)
    counts = [len(reply.add(event)) for event in events]
    assert sum(counts) > 8
    assert max(counts) <= 2


@pytest.mark.parametrize(
    ("ids", "number"),
    [([], 0), (["functions.f:0"], 1), (["call_a", "call_b"], 2), (["functions.f:80"], 81), (["functions.f:0", "x"], 2)],
)
def test_a_new_calls_number_is_above_all_that_occur(ids: list[str], number: int) -> None:
    calls = [{"id": call_id, "function": {"name": "f", "arguments": "{}"}} for call_id in ids]
    assert next_call_number([{"role": "assistant", "tool_calls": calls}]) == number
