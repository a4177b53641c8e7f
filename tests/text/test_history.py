"""Tests of replies rendered as messages and parsed again, of the ids of calls, and of prompts that open reasoning."""

import itertools
from collections.abc import Iterator, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.text.history_reader import read_history
from mlx_k2.text.message import CalledFunction, Message, MessageCall, assistant_message, num_calls, tool_messages
from mlx_k2.text.prompt import encode_pieces, opens_reasoning, render_pieces
from mlx_k2.text.reply_parser import ReplyReader
from mlx_k2.text.reply_parts import Part, Reply, whole_reply
from mlx_k2.text.tool_call import ToolCall
from tests.examples import scaled
from tests.text.fixtures import as_text, builtin_template, tokenizer

USER_MESSAGE = Message(role="user", content="hello")
WEATHER_CALL = ToolCall("functions.get_weather:0", "get_weather", '{"city": "Rome"}', {"city": "Rome"})

hostile_texts = st.lists(
    st.one_of(
        st.sampled_from(["<|im_end|>", "<think>", "</think>", "<|tool_call_begin|>", "<|tool_call_section_begin|>"]),
        st.sampled_from(["<|tool_calls_section_end|>", "<|tool_call_argument_begin|>", "<|tool", "\n", " ", "None"]),
        st.text(max_size=3),
    ),
    max_size=4,
).map("".join)
names = st.from_regex(r"[A-Za-z_][\w.\-]{0,12}", fullmatch=True)


def parts_of(ids: Sequence[int]) -> Iterator[Part]:
    """Yield the parts of the reply with these token ids."""
    reader = ReplyReader(tokenizer(), [], ())
    for token_id in ids:
        yield from reader.add(token_id).parts
    yield from reader.finish().parts


def sampled_ids(messages: list[Message]) -> list[int]:
    """Return the ids of the last message as the model would sample them, without the id that ends the turn."""
    prompt_ids = encode_pieces(tokenizer(), render_pieces(builtin_template(), tokenizer(), messages[:-1]))
    pieces = render_pieces(builtin_template(), tokenizer(), messages, add_generation_prompt=False)
    ids = encode_pieces(tokenizer(), pieces)
    assert ids[: len(prompt_ids)] == prompt_ids
    assert ids[-1] == tokenizer().token_id("<|im_end|>")
    return ids[len(prompt_ids) : -1]


@settings(max_examples=scaled(40))
@given(hostile_texts, hostile_texts, st.lists(st.tuples(names, hostile_texts), min_size=1, max_size=3))
def test_a_rendered_reply_is_parsed_to_the_same_reply(
    reasoning: str, content: str, names_and_arguments: list[tuple[str, str]]
) -> None:
    calls = tuple(ToolCall("", name, arguments, None) for name, arguments in names_and_arguments)
    message = assistant_message(Reply(reasoning, content, calls), num_calls_before=3)
    reply = whole_reply(parts_of(sampled_ids([USER_MESSAGE, message])))
    assert (reply.reasoning, reply.content) == (reasoning, content)
    assert [(call.name, call.arguments) for call in reply.calls] == names_and_arguments
    assert [call.written_id for call in reply.calls] == [call.id for call in message.tool_calls]


def test_a_call_and_its_result_are_rendered_with_one_id() -> None:
    turn = assistant_message(Reply("R", "", (WEATHER_CALL,)), num_calls_before=0)
    conversation = [USER_MESSAGE, turn, *tool_messages(turn, ['{"w":1}'])]
    text = as_text(render_pieces(builtin_template(), tokenizer(), conversation))
    assert text.endswith(
        "<|im_assistant|>assistant<|im_middle|><think>R</think><|tool_calls_section_begin|><|tool_call_begin|>"
        'functions.get_weather:0<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|>'
        "<|tool_calls_section_end|><|im_end|><|im_system|>get_weather<|im_middle|>"
        '## Return of functions.get_weather:0\n{"w":1}<|im_end|><|im_assistant|>assistant<|im_middle|>'
    )


def test_an_empty_reply_is_rendered_as_empty_text() -> None:
    turn = assistant_message(Reply("", "", ()), num_calls_before=0)
    assert turn.json_value() == {"role": "assistant", "content": "", "reasoning_content": ""}
    assert "None" not in as_text(render_pieces(builtin_template(), tokenizer(), [USER_MESSAGE, turn]))


def test_a_tool_call_that_cannot_run_has_an_id_for_its_error_result() -> None:
    broken_call = ToolCall(written_id="3", name="", arguments="{", values=None, error="The call was not run.")
    turn = assistant_message(Reply("", "", (broken_call,)), num_calls_before=5)
    (result,) = tool_messages(turn, ["The call was not run."])
    assert turn.tool_calls[0].function == CalledFunction("unknown", "{")
    assert result.tool_call_id == turn.tool_calls[0].id == "functions.unknown:5"
    messages = [USER_MESSAGE, turn, result]
    assert read_history([message.json_value() for message in messages], template_fields=()).messages == messages


def with_normal_ids(messages: list[Message]) -> list[Message]:
    """Return the messages with the call ids that Kimi K2 is trained on: functions.NAME:NUMBER."""
    return read_history([message.json_value() for message in messages], (), normal_call_ids=True).messages


def test_calls_are_numbered_through_the_conversation() -> None:
    conversation = [USER_MESSAGE]
    for _ in range(3):
        turn = assistant_message(Reply("", "", (WEATHER_CALL, WEATHER_CALL)), num_calls(conversation))
        conversation += [turn, *tool_messages(turn, ["a", "b"])]
    ids = [call.id for message in conversation for call in message.tool_calls]
    assert ids == [f"functions.get_weather:{number}" for number in range(6)]
    assert [message.tool_call_id for message in conversation if message.role == "tool"] == ids
    assert with_normal_ids(conversation) == conversation


@given(st.lists(st.lists(st.tuples(names, st.sampled_from(["0", "1", "call_x"])), max_size=3), max_size=4))
def test_foreign_call_ids_are_normalized_and_each_result_gets_the_id_of_its_call(
    calls_of_turns: list[list[tuple[str, str]]],
) -> None:
    conversation: list[Message] = []
    for calls_of_turn in calls_of_turns:
        tool_calls = tuple(
            MessageCall(id=call_id, function=CalledFunction(name, "{}")) for name, call_id in calls_of_turn
        )
        conversation.append(Message(role="assistant", content="", tool_calls=tool_calls))
        # the results are in another order than the calls, except those with equal ids
        for name, call_id in sorted(calls_of_turn, key=lambda call: call[1]):
            conversation.append(Message(role="tool", tool_call_id=call_id, content=name))
    normal = with_normal_ids([USER_MESSAGE, *conversation])
    calls = [call for message in normal for call in message.tool_calls]
    assert [call.id for call in calls] == [
        f"functions.{name}:{number}" for number, (name, _) in enumerate(itertools.chain(*calls_of_turns))
    ]
    names_by_id = {call.id: call.function.name for call in calls}
    results = [message for message in normal if message.role == "tool"]
    assert sorted(message.tool_call_id or "" for message in results) == sorted(names_by_id)
    assert all(names_by_id[message.tool_call_id or ""] == message.content == message.name for message in results)
    assert with_normal_ids(normal) == normal


def test_a_result_without_a_matching_call_is_unchanged() -> None:
    result = Message(role="tool", tool_call_id="call_9", content="x")
    assert with_normal_ids([USER_MESSAGE, result]) == [USER_MESSAGE, result]


def test_only_a_prompt_whose_last_control_token_is_think_opens_reasoning() -> None:
    think_id, user_id = tokenizer().token_id("<think>"), tokenizer().token_id("<|im_user|>")
    assert opens_reasoning(tokenizer(), [user_id, think_id, *tokenizer().encode_text("\n")])
    assert not opens_reasoning(tokenizer(), [user_id, think_id, tokenizer().token_id("</think>")])
    assert not opens_reasoning(tokenizer(), [user_id, *tokenizer().encode_text("<think>")])
    assert not opens_reasoning(tokenizer(), [])
