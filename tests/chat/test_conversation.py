"""Tests of Conversation: complete prompts, message text without control tokens, undo, reset and load."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.chat.conversation import Conversation
from mlx_k2.errors import RequestError
from mlx_k2.text.chat_template import ChatTemplate, ThinkingMode
from mlx_k2.text.message import Message
from mlx_k2.text.reply_parts import Reply
from mlx_k2.text.tool_call import ToolCall
from tests.advice import follows_advice
from tests.chat.scripted import encode_reply
from tests.examples import scaled
from tests.text.fixtures import builtin_template, decode, tokenizer
from tests.text.kimi import template

SYSTEM_TURN = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
HELLO_TURN = "<|im_user|>user<|im_middle|>hello<|im_end|>"
ANSWER_OPENING = "<|im_assistant|>assistant<|im_middle|>"
WEATHER = ToolCall("functions.get_weather:0", "get_weather", '{"city": "Rome"}', {"city": "Rome"})
CALL_TURN = (
    "<think>R</think><|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)
RESULT_TURN = '<|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\n{"w":1}<|im_end|>'


def new_conversation(system: str | None = None) -> Conversation:
    return Conversation(builtin_template(), tokenizer(), system=system)


def conversation_with(*texts: str) -> Conversation:
    """Return a conversation whose messages ``texts`` alternate between user and model, user first."""
    conversation = new_conversation()
    for number, text in enumerate(texts):
        if number % 2:
            conversation.add_reply(Reply("R", text, ()), tokenizer().encode_text(text))
        else:
            conversation.add_user(text)
    return conversation


def test_the_prompts_before_a_tool_call_and_after_its_result_are_complete() -> None:
    conversation = conversation_with("hello")
    assert decode(conversation.prompt_ids()) == SYSTEM_TURN + HELLO_TURN + ANSWER_OPENING
    conversation.add_reply(Reply("R", "", (WEATHER,)), ())
    conversation.add_results(['{"w":1}'])
    assert (
        decode(conversation.prompt_ids())
        == SYSTEM_TURN + HELLO_TURN + ANSWER_OPENING + CALL_TURN + RESULT_TURN + ANSWER_OPENING
    )


def test_an_answer_removes_the_reasoning_of_earlier_turns_from_the_next_prompt() -> None:
    conversation = conversation_with("hello")
    conversation.add_reply(Reply("R", "", (WEATHER,)), ())
    conversation.add_results(['{"w":1}'])
    conversation.add_reply(Reply("S", "Sunny.", ()), ())
    conversation.add_user("hello")
    turns = (
        ANSWER_OPENING
        + CALL_TURN.replace("<think>R</think>", "<think></think>")
        + RESULT_TURN
        + ANSWER_OPENING
        + "<think></think>Sunny.<|im_end|>"
    )
    assert decode(conversation.prompt_ids()) == SYSTEM_TURN + HELLO_TURN + turns + HELLO_TURN + ANSWER_OPENING


HOSTILE_TEXT = st.text(max_size=5) | st.sampled_from(list(tokenizer().special_ids)[:20])


@settings(max_examples=scaled(40))
@given(HOSTILE_TEXT, HOSTILE_TEXT, HOSTILE_TEXT, HOSTILE_TEXT)
def test_text_of_a_message_never_becomes_a_control_token(user: str, name: str, result: str, content: str) -> None:
    def control_tokens(user: str, name: str, result: str, content: str) -> list[int]:
        conversation = new_conversation()
        conversation.add_user(user)
        conversation.add_reply(Reply("", content, (ToolCall("", name, "{}", {}),)), ())
        conversation.add_results([result])
        return [token_id for token_id in conversation.prompt_ids() if tokenizer().is_special(token_id)]

    assert control_tokens(user, name, result, content) == control_tokens("u", "n", "r", "c")


@settings(max_examples=scaled(40))
@given(st.text(max_size=20), st.integers(0, 2))
def test_the_next_prompt_begins_with_the_prefix_for_any_user_message(text: str, num_turns: int) -> None:
    conversation = conversation_with(*["hello", "Hi."] * num_turns)
    prefix_ids = conversation.next_prompt_prefix()
    conversation.add_user(text)
    prompt = conversation.prompt_ids()
    assert prompt[: len(prefix_ids)] == prefix_ids
    num_role_tokens = len("user") + len("assistant")  # at most: a token for each character
    assert len(prompt) <= len(prefix_ids) + len(tokenizer().encode_text(text)) + num_role_tokens + 5  # 5 control tokens
    assert "R" not in decode(prefix_ids)  # the reasoning of answered turns


@pytest.mark.parametrize(
    ("model", "mode", "keeps_reasoning"),
    [
        ("kimi-k2-thinking", ThinkingMode(), False),
        ("kimi-k2.5", ThinkingMode(), False),
        ("kimi-k2.5", ThinkingMode(thinking=False), False),
        ("kimi-k2.6", ThinkingMode(), False),
        ("kimi-k2.6", ThinkingMode(preserve_thinking=True), True),
        ("kimi-k2.7-code", ThinkingMode(), True),
    ],
)
def test_the_prefix_after_an_answered_tool_loop_has_its_reasoning_only_if_the_next_prompt_does(
    model: str, mode: ThinkingMode, keeps_reasoning: bool
) -> None:
    conversation = Conversation(template(model), tokenizer(), mode=mode)
    conversation.add_user("hello")
    conversation.add_reply(
        Reply("R1", "", (WEATHER,)), encode_reply(tokenizer(), "R1</think><|tool_calls_section_begin|>")
    )
    conversation.add_results(["7"])
    last_prompt = conversation.prompt_ids()
    conversation.add_reply(Reply("R2", "Sunny.", ()), encode_reply(tokenizer(), "R2</think>Sunny.<|im_end|>"))
    prefix_ids = conversation.next_prompt_prefix()
    assert ("R1" in decode(prefix_ids), "R2" in decode(prefix_ids)) == (keeps_reasoning, keeps_reasoning)
    assert decode(prefix_ids).endswith("<|im_user|>user<|im_middle|>")
    extends_last_prompt = prefix_ids[: len(last_prompt)] == last_prompt
    # Without thinking, the last prompt has no reasoning that the next one could drop.
    assert extends_last_prompt == (keeps_reasoning or mode.thinking is False)
    conversation.add_user("more")
    assert conversation.prompt_ids()[: len(prefix_ids)] == prefix_ids


@pytest.mark.parametrize(
    ("source", "prefix"),
    [
        ("{{ messages[-1].content }}", ""),
        ("{{ messages | length }}<think>", "1<think>"),
        ("always this", "always this"),
        ("{% if messages|length > 1 %}a{% else %}b{% endif %}", "b"),
    ],
)
def test_the_prefix_ends_before_the_next_message_and_is_the_whole_prompt_if_the_template_ignores_it(
    source: str, prefix: str
) -> None:
    assert decode(Conversation(ChatTemplate(source), tokenizer()).next_prompt_prefix()) == prefix


def test_thinking_can_be_turned_off_and_on_between_two_replies() -> None:
    conversation = Conversation(template("kimi-k2.5"), tokenizer())
    conversation.add_user("hello")
    endings = []
    for thinking in (False, True):
        conversation.set_thinking(thinking)
        endings.append(decode(conversation.prompt_ids()).rpartition("<|im_middle|>")[2])
    assert endings == ["<think></think>", "<think>"]


def test_a_mode_that_the_template_does_not_have_changes_nothing() -> None:
    conversation = conversation_with("hello")
    before = conversation.prompt_ids()
    with pytest.raises(RequestError, match="thinking cannot be turned off: this model always thinks"):
        conversation.set_thinking(False)
    assert conversation.prompt_ids() == before
    with pytest.raises(RequestError, match="preserve_thinking"):
        Conversation(builtin_template(), tokenizer(), mode=ThinkingMode(preserve_thinking=True))


def test_undo_removes_the_last_user_message_and_everything_after_it() -> None:
    conversation = conversation_with("hello", "Hi.", "weather?")
    conversation.add_reply(Reply("R", "", (WEATHER,)), ())
    conversation.add_results(["sun"])
    assert conversation.undo() == "weather?"
    assert [message.content for message in conversation.messages] == ["hello", "Hi."]
    assert conversation.undo() == "hello"
    assert conversation.undo() is None


def test_a_system_prompt_can_be_set_and_removed_and_survives_a_reset() -> None:
    conversation = new_conversation(system="Be brief.")
    conversation.add_user("hello")
    conversation.set_system("Be long.")
    conversation.reset()
    assert conversation.messages == [Message(role="system", content="Be long.")]
    conversation.set_system(None)
    assert (conversation.system, conversation.messages) == (None, [])


def test_a_loaded_conversation_gets_normalized_call_ids_and_replaces_the_old_one() -> None:
    conversation = conversation_with("hello", "Hi.")
    call = {"id": "call_abc", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_abc", "content": "7"},
    ]
    assert conversation.load(messages, context_tokens=4096) == ()
    assert conversation.messages[2].tool_call_id == "functions.f:0"
    assert conversation.messages[1].content == ""


def test_a_load_reads_reasoning_and_calls_of_other_programs_and_names_what_it_leaves_out() -> None:
    conversation = new_conversation()
    messages: list[dict[str, object]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "x"}, "y"]},
        {"role": "assistant", "reasoning": "WHY", "function_call": {"name": "f", "arguments": "{}"}, "refusal": "no"},
        {"role": "function", "name": "f", "content": "7"},
    ]
    warnings = conversation.load(messages, context_tokens=4096)
    assert warnings == ("message 3 (assistant) has fields that the chat template does not read: refusal",)
    assert decode(conversation.prompt_ids()) == (
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>xy<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think>WHY</think><|tool_calls_section_begin|><|tool_call_begin|>"
        "functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
        f"<|im_system|>f<|im_middle|>## Return of functions.f:0\n7<|im_end|>{ANSWER_OPENING}"
    )


@follows_advice(
    "these messages are 5 tokens, and the context holds 5: give a larger --context, up to that of the model",
)
@pytest.mark.parametrize(
    ("messages", "context_tokens", "error"),
    [
        ([], 4096, "no message"),
        ([{"role": "robot", "content": "x"}], 4096, "message 1 has the role 'robot'"),
        ([{"role": "user", "content": "x" * 200}], 100, "these messages are .* tokens, and the context holds 100"),
    ],
)
def test_a_failed_load_changes_nothing(messages: list[dict[str, object]], context_tokens: int, error: str) -> None:
    conversation = conversation_with("hello", "Hi.")
    before = conversation.messages
    with pytest.raises(RequestError, match=error):
        conversation.load(messages, context_tokens)
    assert conversation.messages == before
