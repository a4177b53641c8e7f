"""Tests of ChatSession with scripted replies: tool calls with real tools, limits, approval, stops and retries."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.chat.chat_events import CallEnded, CallStarted, Event, MessageAdded
from mlx_k2.chat.chat_session import ChatSession, ReplySettings
from mlx_k2.chat.conversation import Conversation
from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.errors import RequestError, TokenizerError
from mlx_k2.sampling import Sampling
from mlx_k2.text.chat_template import ChatTemplate
from mlx_k2.text.message import Message
from mlx_k2.text.reply_parts import Content, Reasoning
from mlx_k2.text.tool_call import ToolCall
from mlx_k2.tools.outcome import Outcome
from mlx_k2.tools.servers import StdioServer
from mlx_k2.tools.toolbox import Limits, ToolBox, open_toolbox
from tests.chat.scripted import ScriptedSource
from tests.text.fixtures import builtin_template, tokenizer

SERVER = Path(__file__).parent.parent / "tools" / "mcp_server.py"
HI_REPLY = "<think>R</think>Hi.<|im_end|>"


@contextmanager
def open_test_tools(call_timeout_s: float) -> Iterator[ToolBox]:
    """Start the tests' tool server. Results are cut after 40 characters."""
    server = StdioServer(name="s", command=sys.executable, args=(str(SERVER),))
    limits = Limits(start_timeout_s=40, call_timeout_s=call_timeout_s, max_result_chars=40)
    with open_toolbox([server], limits) as box:
        yield box


@pytest.fixture(scope="module")
def tools() -> Iterator[ToolBox]:
    with open_test_tools(call_timeout_s=40) as box:
        yield box


def reply_with_calls(*calls: tuple[str, str]) -> str:
    """Return a reply with one tool call for each (name, arguments) pair."""
    section = "".join(
        f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for number, (name, arguments) in enumerate(calls)
    )
    return f"<think>R</think><|tool_calls_section_begin|>{section}<|tool_calls_section_end|><|im_end|>"


def scripted_chat(
    *replies: str,
    tools: ToolBox | None = None,
    approve: Callable[[ToolCall], bool] = lambda call: True,
    on_token: Callable[[int], None] | None = None,
    **settings: Any,
) -> tuple[ChatSession, ScriptedSource]:
    """Return a chat that gets ``replies``, and their source, which has the requests. ``settings`` are ReplySettings."""
    source = ScriptedSource(tokenizer(), *replies, on_token=on_token)
    fields: dict[str, Any] = {"max_tokens": 1000, "context_tokens": 4096} | settings
    declarations = [] if tools is None else tools.declarations
    return ChatSession(
        source,
        tokenizer(),
        Conversation(builtin_template(), tokenizer(), declarations),
        ReplySettings(Sampling(seed=1), stop_ids=tokenizer().stop_ids, **fields),
        tools,
        approve,
    ), source


def roles(chat: ChatSession) -> list[str]:
    return [message.role for message in chat.conversation.messages]


def call_outcomes(events: list[Event]) -> list[tuple[str, Outcome]]:
    """Return the tool's name and the outcome of each call, in the order in which the calls ended."""
    return [(event.call.name, event.result.outcome) for event in events if isinstance(event, CallEnded)]


def test_an_answer_is_streamed_and_each_added_message_is_reported() -> None:
    chat, _ = scripted_chat(HI_REPLY)
    events = list(chat.send_message("hello"))
    assert "".join(event.text for event in events if isinstance(event, Reasoning)) == "R"
    assert "".join(event.text for event in events if isinstance(event, Content)) == "Hi."
    assert [event.message for event in events if isinstance(event, MessageAdded)] == chat.conversation.messages
    assert sum(isinstance(event, AnswerSummary) for event in events) == 1


def test_tools_are_called_until_the_model_answers(tools: ToolBox) -> None:
    chat, source = scripted_chat(
        reply_with_calls(("add", '{"a": 1}')), reply_with_calls(("add", '{"a": 40}')), HI_REPLY, tools=tools
    )
    events = list(chat.send_message("hello"))
    assert call_outcomes(events) == [("add", Outcome.DONE)] * 2
    assert roles(chat) == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    results = [message.content for message in chat.conversation.messages if message.role == "tool"]
    assert results == ["3", "42"]
    ids = [message.tool_call_id for message in chat.conversation.messages if message.role == "tool"]
    assert ids == ["functions.add:0", "functions.add:1"]
    prompt_lengths = [len(request.prompt_ids) for request in source.requests]
    assert prompt_lengths == sorted(prompt_lengths)


def test_tool_calls_of_one_turn_run_concurrently_and_their_results_keep_their_order(tools: ToolBox) -> None:
    chat, _ = scripted_chat(
        reply_with_calls(("meet", "{}"), ("add", '{"a": 1}'), ("meet", "{}")), HI_REPLY, tools=tools
    )
    events = list(chat.send_message("hello"))
    started = [index for index, event in enumerate(events) if isinstance(event, CallStarted)]
    first_end = next(index for index, event in enumerate(events) if isinstance(event, CallEnded))
    assert max(started) < first_end
    contents = [message.content for message in chat.conversation.messages if message.role == "tool"]
    assert contents == ["met", "3", "met"]


@pytest.mark.parametrize(
    ("call", "outcome", "result"),
    [
        (("fail", "{}"), Outcome.FAILED, "Error executing tool fail"),
        (("die", "{}"), Outcome.LOST, "a last word"),
        (("much", '{"length": 100}'), Outcome.CUT, "cut here"),
        (("absent", "{}"), Outcome.REFUSED, "There is no tool"),
        (("add", "{no JSON"), Outcome.REFUSED, "the arguments are not JSON"),
        (("add", '{"a": "x"}'), Outcome.FAILED, "a"),
    ],
)
def test_a_failed_tool_call_is_reported_to_model_and_user_and_the_chat_continues(
    tools: ToolBox, call: tuple[str, str], outcome: Outcome, result: str
) -> None:
    chat, _ = scripted_chat(reply_with_calls(call), HI_REPLY, tools=tools)
    assert call_outcomes(list(chat.send_message("hello"))) == [(call[0], outcome)]
    assert result in chat.conversation.messages[2].content
    assert chat.conversation.messages[-1].content == "Hi."


def test_a_tool_call_past_its_timeout_ends_as_timed_out() -> None:
    with open_test_tools(call_timeout_s=0.5) as tools:
        chat, _ = scripted_chat(reply_with_calls(("hang", "{}")), HI_REPLY, tools=tools)
        assert call_outcomes(list(chat.send_message("hello"))) == [("hang", Outcome.TIMED_OUT)]
    assert "did not answer within 0.5 s" in chat.conversation.messages[2].content


def test_only_approved_tool_calls_run_and_unknown_tools_are_refused_without_asking(tools: ToolBox) -> None:
    arguments: list[str] = []

    def approve(call: ToolCall) -> bool:
        arguments.append(call.arguments)
        return call.arguments == '{"a": 1}'

    chat, _ = scripted_chat(
        reply_with_calls(("add", '{"a": 1}'), ("add", '{"a": 2}'), ("absent", "{}")),
        HI_REPLY,
        tools=tools,
        approve=approve,
    )
    outcomes = [outcome for _, outcome in call_outcomes(list(chat.send_message("hello")))]
    assert set(outcomes) == {Outcome.DECLINED, Outcome.REFUSED, Outcome.DONE}
    assert arguments == ['{"a": 1}', '{"a": 2}']


def test_after_the_tool_call_limit_the_model_gets_one_more_reply_without_tools(tools: ToolBox) -> None:
    add = ("add", '{"a": 1}')
    chat, source = scripted_chat(
        reply_with_calls(add), reply_with_calls(add, add), reply_with_calls(add), tools=tools, max_tool_calls=2
    )
    outcomes = [outcome for _, outcome in call_outcomes(list(chat.send_message("hello")))]
    assert sorted(outcome.value for outcome in outcomes) == ["done", "done", "refused"]
    assert len(source.requests) == 3
    assert not chat.conversation.messages[-1].tool_calls


def test_without_tools_a_tool_call_ends_the_answer_and_is_not_added_to_the_conversation() -> None:
    chat, _ = scripted_chat(reply_with_calls(("add", "{}")))
    events = list(chat.send_message("hello"))
    assert [event.name for event in events if isinstance(event, ToolCall)] == ["add"]
    assert chat.conversation.messages[-1] == Message(role="assistant", content="", reasoning_content="R")


def test_a_stopped_answer_keeps_its_content_and_is_dropped_if_it_has_only_reasoning() -> None:
    def stop_before(stop_index: int) -> Callable[[int], None]:
        return lambda index: chat.stop() if index == stop_index else None

    chat, _ = scripted_chat(HI_REPLY, on_token=stop_before(4))  # after <think>, R, </think>, H
    list(chat.send_message("hello"))
    assert chat.conversation.messages[-1].content == "H"
    chat, _ = scripted_chat(HI_REPLY, on_token=stop_before(2))  # after <think>, R
    list(chat.send_message("hello"))
    assert roles(chat) == ["user"]


def test_a_stop_ends_running_tool_calls_and_gives_each_call_a_result(tools: ToolBox) -> None:
    chat, source = scripted_chat(reply_with_calls(("hang", "{}"), ("add", '{"a": 1}')), HI_REPLY, tools=tools)
    events: list[Event] = []
    for event in chat.send_message("hello"):
        events.append(event)
        if isinstance(event, CallEnded):
            chat.stop()
    assert dict(call_outcomes(events)) == {"add": Outcome.DONE, "hang": Outcome.STOPPED}
    assert roles(chat) == ["user", "assistant", "tool", "tool"]
    assert len(source.requests) == 1


def test_a_retry_sends_the_same_prompt_with_another_seed(tools: ToolBox) -> None:
    chat, source = scripted_chat(reply_with_calls(("add", '{"a": 1}')), HI_REPLY, HI_REPLY, tools=tools)
    list(chat.send_message("hello"))
    list(chat.retry())
    first, _, again = source.requests
    assert again.prompt_ids == first.prompt_ids
    assert again.sampling.seed != first.sampling.seed
    assert roles(chat) == ["user", "assistant"]


def test_a_retry_before_the_first_message_is_refused() -> None:
    chat, _ = scripted_chat()
    with pytest.raises(RequestError, match="nothing to answer"):
        list(chat.retry())


def test_a_message_too_long_for_the_context_is_refused_and_the_conversation_is_unchanged() -> None:
    chat, _ = scripted_chat(HI_REPLY, context_tokens=120)
    list(chat.send_message("hello"))
    with pytest.raises(RequestError, match="the context holds 120"):
        list(chat.send_message("x" * 200))
    assert roles(chat) == ["user", "assistant"]


def test_a_tool_result_too_long_for_the_context_is_an_error_and_stays_in_the_conversation(tools: ToolBox) -> None:
    num_declaration_tokens = len(Conversation(builtin_template(), tokenizer(), tools.declarations).next_prompt_prefix())
    reply = reply_with_calls(("much", '{"length": 38}'))
    chat, _ = scripted_chat(reply, HI_REPLY, tools=tools, context_tokens=num_declaration_tokens + 100)
    with pytest.raises(RequestError, match="there is no room"):
        list(chat.send_message("hello"))
    assert roles(chat) == ["user", "assistant", "tool"]


def test_a_reply_that_max_tokens_cuts_inside_a_tool_call_ends_the_turn(tools: ToolBox) -> None:
    reply = reply_with_calls(("add", '{"a": 1}'))
    chat, source = scripted_chat(reply[: reply.index("1}")], HI_REPLY, tools=tools)
    events = list(chat.send_message("hello"))
    assert len(source.requests) == 1
    assert call_outcomes(events) == []
    assert chat.conversation.messages[-1] == Message(role="assistant", content="", reasoning_content="R")


def test_a_template_error_removes_the_message_of_the_user() -> None:
    template = ChatTemplate("{% if messages | length > 1 %}{{ messages[7].content }}{% endif %}")  # no message 7
    source = ScriptedSource(tokenizer(), HI_REPLY, HI_REPLY)
    settings = ReplySettings(Sampling(seed=1), max_tokens=100, stop_ids=tokenizer().stop_ids, context_tokens=4096)
    chat = ChatSession(source, tokenizer(), Conversation(template, tokenizer(), [], "System."), settings)
    with pytest.raises(TokenizerError):
        list(chat.send_message("hello"))
    assert roles(chat) == ["system"]
