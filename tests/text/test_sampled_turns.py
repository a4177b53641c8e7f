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

USER = Message(role="user", content="hello")


def control(name: str) -> int:
    return tokenizer().token_id(name)


THINK, THINK_END, END = control("<think>"), control("</think>"), control("<|im_end|>")
SECTION, SECTION_END = control("<|tool_calls_section_begin|>"), control("<|tool_calls_section_end|>")
CALL, ARGUMENTS, CALL_END = (control(f"<|tool_call_{name}|>") for name in ("begin", "argument_begin", "end"))


@st.composite
def as_tokens(sample: st.DrawFn, texts: st.SearchStrategy[str]) -> list[int]:
    """Return a text as tokens that a model may sample: each of the tokenizer's own tokens, or its single bytes."""
    ids: list[int] = []
    for token_id in tokenizer().encode_text(sample(texts)):
        ids += list(tokenizer().token_bytes(token_id)) if sample(st.booleans()) else [token_id]
    return ids


words = st.text(max_size=12) | st.sampled_from([" about above after", "é", "<think>", "<|im_end|>", "functions.f:0"])
arguments = st.sampled_from(['{"city": "Rome"}', "{}", '{"a":  1}', "no JSON"])


@st.composite
def replies(sample: st.DrawFn, number: int = 0) -> list[int]:
    """Return the tokens that the model samples for one turn, with at most one call, numbered ``number``."""
    ids = [THINK, *sample(as_tokens(words)), THINK_END, *sample(as_tokens(words))]
    if sample(st.booleans()):
        header = sample(as_tokens(st.just(f"functions.about:{number}")))
        ids += [SECTION, CALL, *header, ARGUMENTS, *sample(as_tokens(arguments)), CALL_END, SECTION_END]
    return [*ids, END]


def message_of(prompt_ids: list[int], sampled: list[int], number: int) -> Message:
    reader = ReplyReader(tokenizer(), prompt_ids, {END})
    parts = [part for token_id in sampled for part in reader.add(token_id).parts]
    return assistant_message(whole_reply([*parts, *reader.finish().parts]), number)


def prompt(turns: SampledTurns, messages: list[Message]) -> list[int]:
    return turns.encode(render_pieces(builtin_template(), tokenizer(), messages))


def next_messages(message: Message) -> list[Message]:
    """Return the messages after a reply: the results of its calls, or the user's next message."""
    calls = message.tool_calls
    return tool_messages(message, ["7"] * len(calls)) if calls else [USER]


@settings(max_examples=scaled(40))
@given(st.data())
def test_each_prompt_of_a_tool_loop_extends_the_cached_tokens(data: st.DataObject) -> None:
    turns, messages = SampledTurns(tokenizer()), [USER]
    cached: list[int] = []
    for number in range(3):
        ids = prompt(turns, messages)
        assert ids[: len(cached)] == cached
        sampled = data.draw(replies(number).filter(lambda ids: CALL in ids))
        message = message_of(ids, sampled, number)
        if "\N{REPLACEMENT CHARACTER}" in str(message):
            return  # an incomplete character: the text of the message differs from the sampled bytes
        turns.keep(number, sampled)
        messages += [message, *next_messages(message)]
        cached = ids + sampled


@given(replies())
def test_after_an_answer_its_content_keeps_the_sampled_tokens_without_the_reasoning(sampled: list[int]) -> None:
    turns = SampledTurns(tokenizer())
    first = prompt(turns, [USER])
    message = message_of(first, sampled, 0)
    answer = msgspec.structs.replace(message, tool_calls=())
    turns.keep(0, sampled)
    content_ids = sampled[sampled.index(THINK_END) + 1 :]
    content_ids = content_ids[: content_ids.index(SECTION) if SECTION in content_ids else content_ids.index(END)]
    if decoded_text(content_ids) != answer.content:
        return
    next_ids = prompt(turns, [USER, answer, USER])
    assert next_ids[: len(first) + 2] == [*first, THINK, THINK_END]
    assert next_ids[len(first) + 2 :][: len(content_ids) + 1] == [*content_ids, END]


def decoded_text(ids: list[int]) -> str:
    return b"".join(map(tokenizer().token_bytes, ids)).decode(errors="replace")


@settings(max_examples=scaled(40))
@given(st.lists(replies(), max_size=3))
def test_a_prompt_with_sampled_tokens_decodes_to_the_templates_text(sampled: list[list[int]]) -> None:
    turns = SampledTurns(tokenizer())
    messages = [USER]
    for number, ids in enumerate(sampled):
        message = message_of(prompt(turns, messages), ids, number)
        turns.keep(number, ids)
        messages += [message, *next_messages(message)]
    pieces = render_pieces(builtin_template(), tokenizer(), messages)
    assert decode(turns.encode(pieces)) == decode(encode_pieces(tokenizer(), pieces))
    specials = [token_id for token_id in turns.encode(pieces) if tokenizer().is_special(token_id)]
    assert specials == [piece for piece in pieces if isinstance(piece, int)]


def test_text_changed_by_the_template_keeps_its_sampled_tokens_up_to_the_change() -> None:
    turns = SampledTurns(tokenizer())
    turns.keep(0, [THINK, THINK_END, *b" about", *b" after", END])
    ids = prompt(turns, [USER, Message(role="assistant", content=" about above"), USER])
    start = ids.index(THINK_END) + 1
    assert ids[start : ids.index(END, start)] == [*b" about a", *tokenizer().encode_text("bove")]


def test_a_character_that_differs_in_one_byte_is_encoded_again_as_a_whole() -> None:
    turns = SampledTurns(tokenizer())
    turns.keep(0, [THINK, THINK_END, *"xé".encode(), END])
    ids = prompt(turns, [USER, Message(role="assistant", content="xè"), USER])
    start = ids.index(THINK_END) + 1
    assert bytes(ids[start : ids.index(END, start)]).decode() == "xè"


def test_user_text_is_encoded_by_the_tokenizer_even_if_the_model_sampled_other_tokens() -> None:
    turns = SampledTurns(tokenizer())
    turns.keep(0, [THINK, THINK_END, *b" about", END])
    ids = prompt(turns, [USER, Message(role="assistant", content=" about"), Message(role="user", content=" about")])
    (word,) = tokenizer().encode_text(" about")
    assert ids.count(word) == 1
    assert [*b" about"] == ids[ids.index(THINK_END) + 1 :][:6]


def test_a_removed_turn_is_encoded_by_the_tokenizer_again() -> None:
    turns = SampledTurns(tokenizer())
    turns.keep(0, [THINK, THINK_END, *b" about", END])
    turns.forget_from(0)
    messages = [USER, Message(role="assistant", content=" about"), USER]
    assert prompt(turns, messages) == encode_pieces(
        tokenizer(), render_pieces(builtin_template(), tokenizer(), messages)
    )
