"""Replies as tokens of a vocabulary, and helpers that parse them. Shared by the tests of this package."""

import re
from collections.abc import Sequence

from mlx_k2.text.markers import NAMES
from mlx_k2.text.reply_parser import ReplyParser
from mlx_k2.text.reply_parts import Part, Reply, whole_reply
from tests.text.fixtures import tokenizer

CONTROL_NAMES = frozenset(name for name in NAMES if name in tokenizer().special_ids)
MARKERS = "(" + "|".join(map(re.escape, sorted(CONTROL_NAMES))) + ")"
SINGULAR_NAMES = sorted(NAMES.keys() - CONTROL_NAMES)

Token = tuple[str, bool]
"""A part of a reply's text, and whether it is a control token."""


def parts(tokens: Sequence[Token], *, in_reasoning: bool = False, names: frozenset[str] = CONTROL_NAMES) -> list[Part]:
    parser = ReplyParser(names, in_reasoning=in_reasoning)
    pieces = [part for piece, control in tokens for part in (parser.control(piece) if control else parser.text(piece))]
    return [*pieces, *parser.finish()]


def tokens_of(text: str) -> list[Token]:
    """Return a reply as tokens, with each marker of the vocabulary as one control token."""
    return [(piece, piece in CONTROL_NAMES) for piece in re.split(MARKERS, text) if piece]


def parse(text: str, *, in_reasoning: bool = False) -> Reply:
    return whole_reply(parts(tokens_of(text), in_reasoning=in_reasoning))


def section(*calls: str) -> str:
    return f"<|tool_calls_section_begin|>{''.join(calls)}<|tool_calls_section_end|>"


def call(written_id: str, arguments: str) -> str:
    return f"<|tool_call_begin|>{written_id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


CALL = section(call("functions.f:0", '{"a": 1}'))
