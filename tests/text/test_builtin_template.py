"""Tests of the built-in template against Kimi K2 Thinking's prompt format, which is written out in this file."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.text.fixtures import as_text, builtin_template, pieces_of, tokenizer

DEFAULT_SYSTEM = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
ANSWER_HEADER = "<|im_assistant|>assistant<|im_middle|>"
HELLO = {"role": "user", "content": "hello"}
HELLO_TEXT = "<|im_user|>user<|im_middle|>hello<|im_end|>"
Message = dict[str, Any]


def render(messages: list[Message], **options: Any) -> str:
    return as_text(pieces_of(builtin_template(), tokenizer(), messages, **options))


def call(arguments: Any, number: int = 0, **fields: Any) -> Message:
    """Return a message with one call and further fields."""
    function = {"name": "get_weather", "arguments": arguments}
    tool_call = {"id": f"functions.get_weather:{number}", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [tool_call]} | fields


def result(number: int = 0, **fields: Any) -> Message:
    """Return the message with the result of the call with this number, and further fields."""
    return {"role": "tool", "tool_call_id": f"functions.get_weather:{number}", "content": '{"w":1}'} | fields


def call_text(arguments: str, reasoning: str = "", content: str = "", number: int = 0) -> str:
    """Return the text of a rendered `call`."""
    return (
        f"<|im_assistant|>assistant<|im_middle|><think>{reasoning}</think>{content}<|tool_calls_section_begin|>"
        f"<|tool_call_begin|>functions.get_weather:{number}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        "<|tool_calls_section_end|><|im_end|>"
    )


def result_text(number: int = 0) -> str:
    """Return the text of a rendered `result`."""
    return f'<|im_system|>tool<|im_middle|>## Return of functions.get_weather:{number}\n{{"w":1}}<|im_end|>'


def test_a_user_message_renders_with_the_default_system_prompt_and_an_opened_answer() -> None:
    assert render([HELLO]) == DEFAULT_SYSTEM + HELLO_TEXT + ANSWER_HEADER


def test_a_system_prompt_replaces_the_default_one() -> None:
    assert render([{"role": "system", "content": "Be brief."}, HELLO]) == (
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|>" + HELLO_TEXT + ANSWER_HEADER
    )


def test_a_later_system_message_does_not_replace_the_default_one() -> None:
    assert render([HELLO, {"role": "system", "content": "S"}]) == (
        DEFAULT_SYSTEM + HELLO_TEXT + "<|im_system|>system<|im_middle|>S<|im_end|>" + ANSWER_HEADER
    )


def test_without_add_generation_prompt_no_answer_is_opened() -> None:
    assert render([HELLO], add_generation_prompt=False) == DEFAULT_SYSTEM + HELLO_TEXT


def test_a_message_name_replaces_the_role() -> None:
    assert "<|im_user|>Ada<|im_middle|>hello" in render([HELLO | {"name": "Ada"}])


def test_a_tools_result_has_the_tools_name_and_the_id_of_its_call() -> None:
    messages = [HELLO, call({"city": "Rome"}, reasoning_content="R"), result(name="get_weather")]
    assert render(messages) == (
        DEFAULT_SYSTEM
        + HELLO_TEXT
        + "<|im_assistant|>assistant<|im_middle|><think>R</think><|tool_calls_section_begin|><|tool_call_begin|>"
        'functions.get_weather:0<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|>'
        "<|tool_calls_section_end|><|im_end|><|im_system|>get_weather<|im_middle|>"
        '## Return of functions.get_weather:0\n{"w":1}<|im_end|><|im_assistant|>assistant<|im_middle|>'
    )


def test_string_arguments_are_kept_as_the_model_wrote_them() -> None:
    assert call_text('{"city":"Rome",  "n":1}') in render([HELLO, call('{"city":"Rome",  "n":1}')])


def test_arguments_keep_key_order_and_are_not_ascii_escaped() -> None:
    assert call_text('{"z": "é<&", "a": [1, null]}') in render([HELLO, call({"z": "é<&", "a": [1, None]})])


def test_several_calls_of_one_turn_are_in_one_section() -> None:
    two_calls = call("{}")
    two_calls["tool_calls"] += call("[]", 1)["tool_calls"]
    assert (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{}"
        "<|tool_call_end|><|tool_call_begin|>functions.get_weather:1<|tool_call_argument_begin|>[]<|tool_call_end|>"
        "<|tool_calls_section_end|>"
    ) in render([HELLO, two_calls])


def test_tools_are_declared_first_with_sorted_keys_and_no_spaces() -> None:
    parameters = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"enum": [{"y": 1, "x": "é"}]}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    assert render([HELLO], tools=[tool]) == (
        "<|im_system|>tool_declare<|im_middle|>"
        '[{"function":{"name":"f","parameters":{"properties":{"a":{"enum":[{"x":"é","y":1}]},"z":{"type":"string"}},'
        '"type":"object"}},"type":"function"}]<|im_end|>' + DEFAULT_SYSTEM + HELLO_TEXT + ANSWER_HEADER
    )


def test_reasoning_is_kept_through_a_tool_loop() -> None:
    messages = [HELLO, call("{}", 0, reasoning_content="R0", content="C"), result(0), call("{}", 1), result(1)]
    assert render(messages) == (
        DEFAULT_SYSTEM
        + HELLO_TEXT
        + call_text("{}", "R0", "C", 0)
        + result_text(number=0)
        + call_text("{}", "", "", 1)
        + result_text(number=1)
        + ANSWER_HEADER
    )


def test_reasoning_up_to_the_last_answer_is_dropped() -> None:
    messages = [
        HELLO,
        call("{}", 0, reasoning_content="R0"),
        result(0),
        {"role": "assistant", "content": "A", "reasoning_content": "RA"},
        HELLO,
        call("{}", 1, reasoning_content="R1"),
        result(1),
    ]
    assert render(messages) == (
        DEFAULT_SYSTEM
        + HELLO_TEXT
        + call_text("{}", "", "", 0)
        + result_text(number=0)
        + "<|im_assistant|>assistant<|im_middle|><think></think>A<|im_end|>"
        + HELLO_TEXT
        + call_text("{}", "R1", "", 1)
        + result_text(number=1)
        + ANSWER_HEADER
    )


@pytest.mark.parametrize("empty", [{"reasoning_content": None}, {"reasoning_content": ""}, {}])
def test_missing_reasoning_renders_as_an_empty_think_block(empty: Message) -> None:
    assert call_text("{}") in render([HELLO, call("{}") | empty])


def test_whitespace_of_messages_is_kept() -> None:
    text = "\n  a \n\n\tb  \n"
    assert f"<|im_user|>user<|im_middle|>{text}<|im_end|>" in render([{"role": "user", "content": text}])
    assert f"functions.get_weather:0\n{text}<|im_end|>" in render([HELLO, call("{}"), result(content=text)])


def reference_text(messages: list[Message]) -> str:
    """Return the messages in Kimi K2 Thinking's format, without a template."""
    is_answer = [message["role"] == "assistant" and not message.get("tool_calls") for message in messages]
    text = "" if messages[0]["role"] == "system" else DEFAULT_SYSTEM
    for index, message in enumerate(messages):
        role = message["role"]
        marker = role if role in ("user", "assistant") else "system"
        text += f"<|im_{marker}|>{message.get('name') or role}<|im_middle|>"
        if role == "assistant":
            has_reasoning = not any(is_answer[index:])  # only turns after the last answer keep their reasoning
            text += f"<think>{(message.get('reasoning_content') or '') if has_reasoning else ''}</think>"
        if role == "tool":
            text += f"## Return of {message['tool_call_id']}\n"
        text += message["content"] or ""
        if message.get("tool_calls"):
            text += "<|tool_calls_section_begin|>"
            for tool_call in message["tool_calls"]:
                text += f"<|tool_call_begin|>{tool_call['id']}<|tool_call_argument_begin|>"
                text += f"{tool_call['function']['arguments']}<|tool_call_end|>"
            text += "<|tool_calls_section_end|>"
        text += "<|im_end|>"
    return text + ANSWER_HEADER


any_message = st.sampled_from(
    [
        HELLO,
        HELLO | {"name": "Ada"},
        {"role": "system", "content": "S"},
        {"role": "assistant", "content": "A"},
        {"role": "assistant", "content": "A", "reasoning_content": "RA"},
        {"role": "assistant", "content": None, "reasoning_content": "RA", "tool_calls": []},
        call("{}"),
        call("{}", reasoning_content="R", content="C"),
        result(),
        result(name="get_weather"),
    ]
)


@given(st.lists(any_message, min_size=1, max_size=9))
def test_messages_in_any_order_render_as_in_kimi_k2_thinkings_format(messages: list[Message]) -> None:
    assert render(messages) == reference_text(messages)
