"""Messages to prompt tokens: text from a message never becomes a control token, the template's own markers do.

Knows templates, tokenizers and messages by what they offer; not where they came from.
"""

import datetime
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from mlx_k2.errors import TokenizerError
from mlx_k2.text.chat_template import ChatTemplate
from mlx_k2.text.escaping import Escaping
from mlx_k2.text.message_checks import checked_messages, checked_tools
from mlx_k2.text.tokenizer import Tokenizer

PromptPiece: TypeAlias = str | int
"""Part of a prompt: ordinary text, or the id of a control token."""


def render_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Mapping[str, object]] | None = None,
    *,
    add_generation_prompt: bool = True,
    **options: object,
) -> list[int]:
    """The token ids of a conversation; arguments and errors are those of ``render_pieces``."""
    pieces = render_pieces(template, tokenizer, messages, tools, add_generation_prompt=add_generation_prompt, **options)
    return encode_pieces(tokenizer, pieces)


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[PromptPiece]) -> list[int]:
    """The token ids of ``pieces``; the text between two control tokens is encoded as one."""
    ids: list[int] = []
    for piece in pieces:
        ids += [piece] if isinstance(piece, int) else tokenizer.encode_text(piece)
    return ids


def opens_reasoning(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Whether the answer begins inside the reasoning: the last control token of the prompt is <think>."""
    last = next((number for number in reversed(prompt_ids) if tokenizer.is_special(number)), None)
    return last is not None and last == tokenizer.special_ids.get("<think>")


def render_pieces(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Mapping[str, object]] | None = None,
    *,
    add_generation_prompt: bool = True,
    **options: object,
) -> list[PromptPiece]:
    """A conversation as the template writes it, text and control tokens apart; no two texts stand side by side.

    ``options`` are handed to the template, as text from outside like the messages.

    The template renders twice: plainly, and with all text from outside in disguise. What spells a control token's
    name in the second is the template's own, and the second, revealed, must equal the first.

    Raises:
        RequestError: a message or a tool is malformed, or the template refuses them.
        TokenizerError: the template fails, or does something with text that a disguise does not come through.
    """
    declared = checked_tools(tools) if tools else None  # None, not absent: some templates ask `tools is not none`
    outside: dict[str, object] = {"messages": checked_messages(messages), "tools": declared, **options}
    own = {"add_generation_prompt": add_generation_prompt, "strftime_now": datetime.datetime.now().strftime}
    escaping = Escaping(tokenizer.special_ids, [template.source, *_texts(outside)])
    plain = template.render(outside | own)
    escaped = template.render(_escaped(outside, escaping) | own)
    if escaping.unescape(escaped) != plain:
        raise TokenizerError("the chat template alters message text in a way that cannot be told from its own markers")
    return [piece if isinstance(piece, int) else escaping.unescape(piece) for piece in _split(escaped, tokenizer)]


def _escaped(outside: Mapping[str, object], escaping: Escaping) -> dict[str, object]:
    """All text from outside in disguise, but for the roles: four known words, which templates build markers from."""
    escaped: dict[str, object] = {name: escaping.escape(value) for name, value in outside.items()}
    messages = outside["messages"]
    assert isinstance(messages, list)
    escaped["messages"] = [escaping.escape(message) | {"role": message["role"]} for message in messages]
    return escaped


def _texts(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            yield from value.keys()
            for item in value.values():
                yield from _texts(item)
        case list() | tuple():
            for item in value:
                yield from _texts(item)


def _split(text: str, tokenizer: Tokenizer) -> Iterator[PromptPiece]:
    """``text`` at the control tokens' names; where two could stand, the longer one does."""
    names = sorted(tokenizer.special_ids, key=len, reverse=True)
    markers = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    end = 0
    for marker in markers.finditer(text):
        if marker.start() > end:
            yield text[end : marker.start()]
        yield tokenizer.special_ids[marker.group()]
        end = marker.end()
    if end < len(text):
        yield text[end:]
