"""Tests of Conversation: golden prompts, message text without control tokens, undo, reset and load."""

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
from tests.chat.scripted import sampled
from tests.examples import scaled
from tests.text.fixtures import builtin_template, decode, tokenizer
from tests.text.kimi import template

SYSTEM = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
HELLO = "<|im_user|>user<|im_middle|>hello<|im_end|>"
ANSWER = "<|im_assistant|>assistant<|im_middle|>"
WEATHER = ToolCall("functions.get_weather:0", "get_weather", '{"city": "Rome"}', {"city": "Rome"})
CALL_TURN = (
    "<think>R</think><|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)
RESULT_TURN = '<|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\n{"w":1}<|im_end|>'


def conversation(system: str | None = None) -> Conversation:
    return Conversation(builtin_template(), tokenizer(), system=system)


def conversation_of(*texts: str) -> Conversation:
    """Return a conversation whose messages ``texts`` alternate between user and model, user first."""
    talk = conversation()
    for number, text in enumerate(texts):
        if number % 2:
            talk.add_reply(Reply("R", text, ()), tokenizer().encode_text(text))
        else:
            talk.add_user(text)
    return talk


def test_the_prompts_of_a_tool_turn_equal_the_golden_prompts() -> None:
    talk = conversation_of("hello")
    assert decode(talk.prompt_ids()) == SYSTEM + HELLO + ANSWER
    talk.add_reply(Reply("R", "", (WEATHER,)), ())
    talk.add_results(['{"w":1}'])
    assert decode(talk.prompt_ids()) == SYSTEM + HELLO + ANSWER + CALL_TURN + RESULT_TURN + ANSWER


def test_an_answer_removes_the_reasoning_of_earlier_turns_from_the_next_prompt() -> None:
    talk = conversation_of("hello")
    talk.add_reply(Reply("R", "", (WEATHER,)), ())
    talk.add_results(['{"w":1}'])
    talk.add_reply(Reply("S", "Sunny.", ()), ())
    talk.add_user("hello")
    turns = ANSWER + CALL_TURN.replace("R</", "</", 1) + RESULT_TURN + ANSWER + "<think></think>Sunny.<|im_end|>"
    assert decode(talk.prompt_ids()) == SYSTEM + HELLO + turns + HELLO + ANSWER


hostile = st.text(max_size=5) | st.sampled_from(list(tokenizer().special_ids)[:20])


@settings(max_examples=scaled(40))
@given(hostile, hostile, hostile, hostile)
def test_text_of_the_user_and_of_tools_never_becomes_a_control_token(
    user: str, name: str, result: str, content: str
) -> None:
    plain, odd = conversation(), conversation()
    for talk, texts in ((plain, ("u", "n", "r", "c")), (odd, (user, name, result, content))):
        talk.add_user(texts[0])
        talk.add_reply(Reply("", texts[3], (ToolCall("", texts[1], "{}", {}),)), ())
        talk.add_results([texts[2]])
    controls = [
        [token_id for token_id in talk.prompt_ids() if tokenizer().is_special(token_id)] for talk in (plain, odd)
    ]
    assert controls[0] == controls[1]


@settings(max_examples=scaled(40))
@given(st.text(max_size=20), st.integers(0, 2))
def test_known_ids_are_a_prefix_of_the_next_prompt_for_any_user_message(text: str, num_turns: int) -> None:
    talk = conversation_of(*["hello", "Hi."] * num_turns)
    known = talk.known_ids()
    talk.add_user(text)
    prompt = talk.prompt_ids()
    assert prompt[: len(known)] == known
    own = tokenizer().encode_text(text)
    assert len(prompt) <= len(known) + len(own) + len("user") + len("assistant") + 5
    assert "R" not in decode(known).replace("Return", "")


@pytest.mark.parametrize(
    ("model", "mode", "keeps"),
    [
        ("kimi-k2-thinking", ThinkingMode(), False),
        ("kimi-k2.5", ThinkingMode(), False),
        ("kimi-k2.5", ThinkingMode(thinking=False), False),
        ("kimi-k2.6", ThinkingMode(), False),
        ("kimi-k2.6", ThinkingMode(preserve_thinking=True), True),
        ("kimi-k2.7-code", ThinkingMode(), True),
    ],
)
def test_known_ids_after_an_answered_tool_loop_hold_its_reasoning_only_if_the_next_prompt_does(
    model: str, mode: ThinkingMode, keeps: bool
) -> None:
    talk = Conversation(template(model), tokenizer(), mode=mode)
    talk.add_user("hello")
    loop = [talk.prompt_ids()]
    talk.add_reply(Reply("R1", "", (WEATHER,)), sampled(tokenizer(), "R1</think><|tool_calls_section_begin|>"))
    talk.add_results(["7"])
    loop.append(talk.prompt_ids())
    talk.add_reply(Reply("R2", "Sunny.", ()), sampled(tokenizer(), "R2</think>Sunny.<|im_end|>"))
    known = talk.known_ids()
    assert ("R1" in decode(known), "R2" in decode(known)) == (keeps, keeps)
    assert decode(known).endswith("<|im_user|>user<|im_middle|>")
    assert (known[: len(loop[1])] == loop[1]) == (keeps or mode.thinking is False)
    talk.add_user("more")
    assert talk.prompt_ids()[: len(known)] == known


@pytest.mark.parametrize(
    ("source", "text"), [("{{ messages[-1].content }}", ""), ("{{ messages | length }}<think>", "1<think>")]
)
def test_a_template_with_nothing_before_the_user_message_or_without_it_has_a_known_prefix(
    source: str, text: str
) -> None:
    assert decode(Conversation(ChatTemplate(source), tokenizer()).known_ids()) == text


def test_thinking_can_be_turned_off_and_on_between_two_replies() -> None:
    talk = Conversation(template("kimi-k2.5"), tokenizer())
    talk.add_user("hello")
    endings = []
    for thinking in (False, True):
        talk.set_thinking(thinking)
        endings.append(decode(talk.prompt_ids()).rpartition("<|im_middle|>")[2])
    assert endings == ["<think></think>", "<think>"]


def test_a_mode_that_the_template_does_not_have_changes_nothing() -> None:
    talk = conversation_of("hello")
    before = talk.prompt_ids()
    with pytest.raises(RequestError, match="thinking cannot be turned off: this model always thinks"):
        talk.set_thinking(False)
    assert talk.prompt_ids() == before
    with pytest.raises(RequestError, match="preserve_thinking"):
        Conversation(builtin_template(), tokenizer(), mode=ThinkingMode(preserve_thinking=True))


def test_undo_removes_the_last_user_message_and_everything_after_it() -> None:
    talk = conversation_of("hello", "Hi.", "weather?")
    talk.add_reply(Reply("R", "", (WEATHER,)), ())
    talk.add_results(["sun"])
    assert talk.undo() == "weather?"
    assert [message.content for message in talk.messages] == ["hello", "Hi."]
    assert talk.undo() == "hello"
    assert talk.undo() is None


def test_a_system_prompt_can_be_set_and_removed_and_survives_a_reset() -> None:
    talk = conversation(system="Be brief.")
    talk.add_user("hello")
    talk.set_system("Be long.")
    talk.reset()
    assert talk.messages == [Message(role="system", content="Be long.")]
    talk.set_system(None)
    assert (talk.system, talk.messages) == (None, [])


def test_a_loaded_conversation_gets_normalized_call_ids_and_replaces_the_old_one() -> None:
    talk = conversation_of("hello", "Hi.")
    call = {"id": "call_abc", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    loaded: list[dict[str, object]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_abc", "content": "7"},
    ]
    assert talk.load(loaded, 4096) == ()
    assert talk.messages[2].tool_call_id == "functions.f:0"
    assert talk.messages[1].content == ""


def test_a_load_reads_reasoning_and_calls_of_other_programs_and_names_what_it_leaves_out() -> None:
    talk = conversation()
    loaded: list[dict[str, object]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "x"}, "y"]},
        {"role": "assistant", "reasoning": "WHY", "function_call": {"name": "f", "arguments": "{}"}, "refusal": "no"},
        {"role": "function", "name": "f", "content": "7"},
    ]
    left_out = talk.load(loaded, 4096)
    assert left_out == ("message 3 (assistant) has fields that the chat template does not read: refusal",)
    assert decode(talk.prompt_ids()) == (
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>xy<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think>WHY</think><|tool_calls_section_begin|><|tool_call_begin|>"
        "functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
        f"<|im_system|>f<|im_middle|>## Return of functions.f:0\n7<|im_end|>{ANSWER}"
    )


@follows_advice(
    "these messages are 5 tokens, and the context holds 5: give a larger --context, up to that of the model",
)
@pytest.mark.parametrize(
    ("messages", "context_tokens", "words"),
    [
        ([], 4096, "no message"),
        ([{"role": "robot", "content": "x"}], 4096, "message 1 has the role 'robot'"),
        ([{"role": "user", "content": "x" * 200}], 100, "these messages are .* tokens, and the context holds 100"),
    ],
)
def test_a_load_that_fails_does_not_change_the_conversation(
    messages: list[dict[str, object]], context_tokens: int, words: str
) -> None:
    talk = conversation_of("hello", "Hi.")
    before = talk.messages
    with pytest.raises(RequestError, match=words):
        talk.load(messages, context_tokens)
    assert talk.messages == before


@pytest.mark.parametrize("source", ["always this", "{% if messages|length > 1 %}a{% else %}b{% endif %}"])
def test_known_ids_of_a_template_that_ignores_the_last_message_are_the_whole_prompt(source: str) -> None:
    talk = Conversation(ChatTemplate(source), tokenizer())
    assert decode(talk.known_ids()) in ("always this", "b")
