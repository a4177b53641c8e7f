"""Tests of SampledTurns: the next prompt has the sampled tokens of a turn wherever the turn's text is unchanged."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.text.message import Message, assistant_message, tool_messages
from mlx_k2.text.prompt import encode_pieces, render_pieces
from mlx_k2.text.reply_parser import ReplyReader
from mlx_k2.text.reply_parts import whole_reply
from mlx_k2.text.sampled_turns import SampledTurns
from tests.examples import scaled
from tests.text.fixtures import builtin_template, decode, tokenizer

USER_MESSAGE = Message(role="user", content="hello")
THINK_ID, THINK_END_ID, END_ID = map(tokenizer().token_id, ("<think>", "</think>", "<|im_end|>"))
SECTION_ID = tokenizer().token_id("<|tool_calls_section_begin|>")
SECTION_END_ID = tokenizer().token_id("<|tool_calls_section_end|>")
CALL_ID = tokenizer().token_id("<|tool_call_begin|>")
ARGUMENTS_ID = tokenizer().token_id("<|tool_call_argument_begin|>")
CALL_END_ID = tokenizer().token_id("<|tool_call_end|>")


@st.composite
def sampled_text(sample: st.DrawFn, texts: st.SearchStrategy[str]) -> list[int]:
    """Return a text as ids that a model may sample: each token that the tokenizer makes, or its single bytes."""
    ids: list[int] = []
    for token_id in tokenizer().encode_text(sample(texts)):
        is_split = sample(st.booleans())
        ids += tokenizer().token_bytes(token_id) if is_split else [token_id]
    return ids


words = st.text(max_size=12) | st.sampled_from([" about above after", "é", "<think>", "<|im_end|>", "functions.f:0"])
arguments = st.sampled_from(['{"city": "Rome"}', "{}", '{"a":  1}', "no JSON"])


@st.composite
def replies(sample: st.DrawFn, number: int = 0) -> list[int]:
    """Return the tokens that the model samples for one turn, with at most one call, numbered ``number``."""
    ids = [THINK_ID, *sample(sampled_text(words)), THINK_END_ID, *sample(sampled_text(words))]
    if sample(st.booleans()):
        header = sample(sampled_text(st.just(f"functions.about:{number}")))
        ids += [
            SECTION_ID,
            CALL_ID,
            *header,
            ARGUMENTS_ID,
            *sample(sampled_text(arguments)),
            CALL_END_ID,
            SECTION_END_ID,
        ]
    return [*ids, END_ID]


def message_of(prompt: list[int], sampled: list[int], number: int) -> Message:
    """Return the message that the sampled tokens make, with its calls numbered from ``number``."""
    reader = ReplyReader(tokenizer(), prompt, {END_ID})
    parts = [part for token_id in sampled for part in reader.add(token_id).parts]
    return assistant_message(whole_reply([*parts, *reader.finish().parts]), number)


def prompt_ids(turns: SampledTurns, messages: list[Message]) -> list[int]:
    return turns.encode(render_pieces(builtin_template(), tokenizer(), messages))


def next_messages(message: Message) -> list[Message]:
    """Return the messages after a reply: the results of its calls, or the user's next message."""
    calls = message.tool_calls
    return tool_messages(message, ["7"] * len(calls)) if calls else [USER_MESSAGE]


@settings(max_examples=scaled(40))
@given(st.data())
def test_each_prompt_of_a_tool_loop_extends_the_cached_tokens(data: st.DataObject) -> None:
    turns, messages = SampledTurns(tokenizer()), [USER_MESSAGE]
    cached: list[int] = []
    for number in range(3):
        ids = prompt_ids(turns, messages)
        assert ids[: len(cached)] == cached
        sampled = data.draw(replies(number).filter(lambda ids: CALL_ID in ids))
        message = message_of(ids, sampled, number)
        turns.keep(number, sampled)
        messages += [message, *next_messages(message)]
        cached = ids + sampled


@given(replies())
def test_after_an_answer_its_content_keeps_the_sampled_tokens_without_the_reasoning(sampled: list[int]) -> None:
    turns = SampledTurns(tokenizer())
    first_prompt = prompt_ids(turns, [USER_MESSAGE])
    answer = msgspec.structs.replace(message_of(first_prompt, sampled, 0), tool_calls=())
    turns.keep(0, sampled)
    content_start = sampled.index(THINK_END_ID) + 1
    content_end = sampled.index(SECTION_ID if SECTION_ID in sampled else END_ID)
    content_ids = sampled[content_start:content_end]
    assert decode(content_ids) == answer.content
    next_prompt = prompt_ids(turns, [USER_MESSAGE, answer, USER_MESSAGE])
    expected = [*first_prompt, THINK_ID, THINK_END_ID, *content_ids, END_ID]
    assert next_prompt[: len(expected)] == expected


@settings(max_examples=scaled(40))
@given(st.lists(replies(), max_size=3))
def test_a_prompt_with_sampled_tokens_decodes_to_the_templates_text(sampled: list[list[int]]) -> None:
    turns = SampledTurns(tokenizer())
    messages = [USER_MESSAGE]
    for number, ids in enumerate(sampled):
        message = message_of(prompt_ids(turns, messages), ids, number)
        turns.keep(number, ids)
        messages += [message, *next_messages(message)]
    pieces = render_pieces(builtin_template(), tokenizer(), messages)
    assert decode(turns.encode(pieces)) == decode(encode_pieces(tokenizer(), pieces))
    control_ids = [token_id for token_id in turns.encode(pieces) if tokenizer().is_special(token_id)]
    assert control_ids == [piece for piece in pieces if isinstance(piece, int)]


def test_text_changed_by_the_template_keeps_its_sampled_tokens_up_to_the_change() -> None:
    turns = SampledTurns(tokenizer())
    turns.keep(0, [THINK_ID, THINK_END_ID, *b" about", *b" after", END_ID])
    ids = prompt_ids(turns, [USER_MESSAGE, Message(role="assistant", content=" about above"), USER_MESSAGE])
    start = ids.index(THINK_END_ID) + 1
    assert ids[start : ids.index(END_ID, start)] == [*b" about a", *tokenizer().encode_text("bove")]


def test_a_character_that_differs_in_one_byte_is_encoded_again_as_a_whole() -> None:
    turns = SampledTurns(tokenizer())
    turns.keep(0, [THINK_ID, THINK_END_ID, *"xé".encode(), END_ID])
    ids = prompt_ids(turns, [USER_MESSAGE, Message(role="assistant", content="xè"), USER_MESSAGE])
    start = ids.index(THINK_END_ID) + 1
    assert bytes(ids[start : ids.index(END_ID, start)]).decode() == "xè"


def test_text_of_the_user_is_encoded_by_the_tokenizer_even_if_the_model_sampled_it_as_other_tokens() -> None:
    turns = SampledTurns(tokenizer())
    turns.keep(0, [THINK_ID, THINK_END_ID, *b" about", END_ID])
    ids = prompt_ids(
        turns, [USER_MESSAGE, Message(role="assistant", content=" about"), Message(role="user", content=" about")]
    )
    (word,) = tokenizer().encode_text(" about")
    assert ids.count(word) == 1
    start = ids.index(THINK_END_ID) + 1
    assert ids[start : start + 6] == [*b" about"]


def test_a_removed_turn_is_encoded_by_the_tokenizer_again() -> None:
    turns = SampledTurns(tokenizer())
    turns.keep(0, [THINK_ID, THINK_END_ID, *b" about", END_ID])
    turns.forget_from(0)
    messages = [USER_MESSAGE, Message(role="assistant", content=" about"), USER_MESSAGE]
    pieces = render_pieces(builtin_template(), tokenizer(), messages)
    assert prompt_ids(turns, messages) == encode_pieces(tokenizer(), pieces)
