"""Conversion of messages to prompt tokens. The template's markers become control tokens; message text never does.

Knows templates, tokenizers and messages, but no files.
"""

import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from mlx_k2.errors import RequestError, TokenizerError
from mlx_k2.text.chat_template import ChatTemplate
from mlx_k2.text.escaping import Escaping
from mlx_k2.text.history_reader import copied_json, read_history
from mlx_k2.text.message import Message
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.text.typescript_tools import typescript_tools

PromptPiece: TypeAlias = str | int
"""A part of a prompt: ordinary text, or the id of a control token."""
_WINDOW_CHARS = 16_384


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[PromptPiece]) -> list[int]:
    """Return the token ids of ``pieces``; each text is encoded separately."""
    ids: list[int] = []
    for piece in pieces:
        ids += [piece] if isinstance(piece, int) else tokenizer.encode_text(piece)
    return ids


def opens_reasoning(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Return whether the prompt ends inside the reasoning: its last control token is <think>."""
    last_control = next((token_id for token_id in reversed(prompt_ids) if tokenizer.is_special(token_id)), None)
    return last_control is not None and last_control == tokenizer.special_ids.get("<think>")


def render_pieces(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message | Mapping[str, object]],
    tools: Sequence[Mapping[str, object]] | None = None,
    *,
    add_generation_prompt: bool = True,
    **options: object,
) -> list[PromptPiece]:
    """Render a conversation; return its text and its control tokens as separate pieces, with no two adjacent texts.

    A message that is a mapping is in OpenAI's format. ``options`` are further variables of the template. The text of
    messages, tools and options is the input text.

    The template renders twice: with the input text unchanged, and with all input text escaped. Control tokens are the
    names that the second rendering spells: only the template can have written them. The second rendering, unescaped,
    must equal the first.

    Raises:
        RequestError: a tool or a mapping is malformed, or the template refuses the messages.
        TokenizerError: the template fails, or changes input text in a way that escaping does not preserve.
    """
    fields = [message.json_value() if isinstance(message, Message) else message for message in messages]
    if any(isinstance(message, Mapping) for message in messages):
        fields = [message.json_value() for message in read_history(fields, template.fields).messages]
    inputs: dict[str, object] = {
        "messages": [copied_json(message, "a message") for message in fields],
        "documents": None,  # as transformers sets it without documents: a template may test `is none`
        **_declarations(template, tools or ()),
        **options,
    }
    now = datetime.datetime.now()
    program_variables = {"add_generation_prompt": add_generation_prompt, "strftime_now": now.strftime}
    escaping = Escaping(tokenizer.special_ids, [template.source, *_texts(inputs)])
    plain = template.render(inputs | program_variables)
    escaped = template.render(_escaped(inputs, escaping) | program_variables)
    if escaping.unescape(escaped) != plain:
        raise TokenizerError("the chat template alters message text, so that it cannot be distinguished from markers")
    return [piece if isinstance(piece, int) else escaping.unescape(piece) for piece in _split(escaped, tokenizer)]


def _declarations(template: ChatTemplate, tools: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Return the template's variables that declare ``tools``, as the Python code of Kimi's tokenizers computes them.

    Models that think were trained on declarations with sorted keys, and K2.5 and later models on TypeScript.
    """
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, Mapping):
            raise RequestError(f"tool {number} is not an object")
    reads_typescript = "tools_ts_str" in template.variables
    sort = template.has_reasoning or reads_typescript
    declarations = [copied_json(tool, f"tool {number}", sort=sort) for number, tool in enumerate(tools, start=1)]
    variables: dict[str, object] = {"tools": declarations or None}  # None is set: some templates test `is not none`
    if reads_typescript and (typescript := typescript_tools(declarations)):
        variables["tools_ts_str"] = typescript
    return variables


def _escaped(inputs: Mapping[str, object], escaping: Escaping) -> dict[str, object]:
    """Return the input with all text escaped, except the messages' roles, from which templates build markers."""
    escaped: dict[str, object] = {name: escaping.escape(value) for name, value in inputs.items()}
    messages = inputs["messages"]
    assert isinstance(messages, list)
    escaped["messages"] = [escaping.escape(message) | {"role": message["role"]} for message in messages]
    return escaped


def _texts(value: object) -> Iterator[str]:
    """Yield each text in a value of JSON, keys included."""
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
    """Yield ``text`` split at the control tokens' names. It is searched in windows, so that other threads can run."""
    longest = max(map(len, tokenizer.special_ids), default=0)
    piece_start = start = 0
    while start < len(text):
        marker = tokenizer.special_names.search(text, start, start + _WINDOW_CHARS + longest)
        if marker is None or marker.start() >= start + _WINDOW_CHARS:
            start += _WINDOW_CHARS
            continue
        if marker.start() > piece_start:
            yield text[piece_start : marker.start()]
        yield tokenizer.special_ids[marker.group()]
        start = piece_start = marker.end()
    if piece_start < len(text):
        yield text[piece_start:]
