"""Replies as text, as the tokens that the model samples for the text, and parsed."""

import re
from collections.abc import Sequence

from mlx_k2.text.markers import NAMES
from mlx_k2.text.reply_parser import ReplyParser
from mlx_k2.text.reply_parts import Part, Reply, whole_reply
from mlx_k2.text.tokenizer import Tokenizer
from tests.text.fixtures import tokenizer

VOCABULARY_MARKERS = frozenset(name for name in NAMES if name in tokenizer().special_ids)
SINGULAR_MARKERS = sorted(NAMES.keys() - VOCABULARY_MARKERS)
"""Markers with "call" in place of "calls", which some checkpoints write as text."""
_MARKER_PATTERN = "(" + "|".join(map(re.escape, sorted(VOCABULARY_MARKERS))) + ")"

Token = tuple[str, bool]
"""A part of a reply's text, and whether it is a control token."""


def parse_tokens(
    tokens: Sequence[Token], *, in_reasoning: bool = False, names: frozenset[str] = VOCABULARY_MARKERS
) -> list[Part]:
    """Return the parts of a reply. ``names`` are the markers that are control tokens."""
    parser = ReplyParser(names, in_reasoning=in_reasoning)
    parts: list[Part] = []
    for text, is_control in tokens:
        parts += parser.control(text) if is_control else parser.text(text)
    return [*parts, *parser.finish()]


def reply_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return a reply as token ids, with each marker as its control token."""
    ids: list[int] = []
    for piece, is_control in tokens_of(text):
        ids += [tokenizer.special_ids[piece]] if is_control else tokenizer.encode_text(piece)
    return ids


def tokens_of(text: str) -> list[Token]:
    """Return a reply as tokens, with each marker of the vocabulary as one control token."""
    return [(piece, piece in VOCABULARY_MARKERS) for piece in re.split(_MARKER_PATTERN, text) if piece]


def parse_reply(text: str, *, in_reasoning: bool = False) -> Reply:
    return whole_reply(parse_tokens(tokens_of(text), in_reasoning=in_reasoning))


def section(*calls: str) -> str:
    """Return the text of a section of calls."""
    return f"<|tool_calls_section_begin|>{''.join(calls)}<|tool_calls_section_end|>"


def call(written_id: str, arguments: str) -> str:
    """Return the text of a call, for `section`."""
    return f"<|tool_call_begin|>{written_id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


CALL_SECTION = section(call("functions.f:0", '{"a": 1}'))
"""The text of a section with one call."""
