"""Prompts in which the model's turns keep the tokens that it sampled. Knows no messages and no template.

A model does not always sample the tokens that the tokenizer would choose for the same text. The cache has the sampled
tokens, and a prompt with other tokens would not match it.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TypeAlias

from mlx_k2.text.prompt import PromptPiece
from mlx_k2.text.tokenizer import Tokenizer

_TURN_BEGIN, _BODY_BEGIN, _TURN_END = "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"

_SampledTurn: TypeAlias = tuple[tuple[int, ...] | int, ...]
"""The tokens of a turn: ids of control tokens, and tuples of the ordinary tokens between them."""


class SampledTurns:
    """The sampled tokens of assistant turns by turn number. The number counts the assistant's turns from 0."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        get_id = tokenizer.special_ids.get
        self._turn_id, self._body_id, self._end_id = map(get_id, (_TURN_BEGIN, _BODY_BEGIN, _TURN_END))
        self._sampled: dict[int, _SampledTurn] = {}
        self._encoded: dict[str, list[int]] = {}
        """The tokens of the texts that the previous ``encode`` passed to the tokenizer."""

    def keep(self, turn: int, token_ids: Iterable[int]) -> None:
        """Store ``token_ids`` as the sampled tokens of turn number ``turn``."""
        sampled: list[tuple[int, ...] | int] = []
        for is_special, group in groupby(token_ids, self._tokenizer.is_special):
            run = tuple(group)
            sampled += run if is_special else (run,)
        self._sampled[turn] = tuple(sampled)

    def forget_from(self, turn: int) -> None:
        """Remove the sampled tokens of turn number ``turn`` and of all later turns."""
        self._sampled = {number: sampled for number, sampled in self._sampled.items() if number < turn}

    def encode(self, pieces: Sequence[PromptPiece]) -> list[int]:
        """Return the token ids of a rendered conversation.

        Text of a sampled turn keeps the sampled tokens up to the first change by the template. The tokenizer encodes
        the rest, and all other texts.
        """
        ids: list[int] = []
        encoded: dict[str, list[int]] = {}
        turn, in_header, body = -1, False, _Body(())
        for piece in pieces:
            if isinstance(piece, str):
                ids += self._with_sampled(body.pass_text(), piece) or self._encode(piece, encoded)
                continue
            ids.append(piece)
            if piece == self._turn_id:
                turn, in_header = turn + 1, True
            elif piece == self._body_id and in_header:
                body, in_header = _Body(self._sampled.get(turn, ())), False
            elif piece == self._end_id:
                body = _Body(())
            else:
                body.pass_control(piece)
        self._encoded = encoded
        return ids

    def _with_sampled(self, sampled_ids: tuple[int, ...], text: str) -> list[int]:
        """Return the sampled tokens with which ``text`` begins, then its rest encoded; [] if it begins with none."""
        data = text.encode()
        kept: list[int] = []
        end = 0
        for token_id in sampled_ids:
            token = self._tokenizer.token_bytes(token_id)
            if not data.startswith(token, end):
                break
            kept.append(token_id)
            end += len(token)
        while kept and end < len(data) and data[end] & 0xC0 == 0x80:  # ``end`` is inside a character of UTF-8
            end -= len(self._tokenizer.token_bytes(kept.pop()))
        return [*kept, *self._tokenizer.encode_text(data[end:].decode())] if kept else []

    def _encode(self, text: str, encoded: dict[str, list[int]]) -> list[int]:
        """Return the tokenizer's ids for ``text``, cached by the previous ``encode``; add them to ``encoded``."""
        ids = self._encoded.get(text)
        encoded[text] = self._tokenizer.encode_text(text) if ids is None else ids
        return encoded[text]


class _Body:
    """The sampled tokens of a turn, and the position in them that its rendering has reached."""

    def __init__(self, sampled: _SampledTurn) -> None:
        self._sampled = sampled
        self._next_index = 0

    def pass_control(self, token_id: int) -> None:
        """Move past this token if it was sampled after the position; skip sampled tokens that are not rendered."""
        if token_id in self._sampled[self._next_index :]:
            self._next_index = self._sampled.index(token_id, self._next_index) + 1

    def pass_text(self) -> tuple[int, ...]:
        """Return the ordinary tokens sampled at the position, and move past them; () if there are none."""
        ordinary_ids = self._sampled[self._next_index] if self._next_index < len(self._sampled) else None
        if not isinstance(ordinary_ids, tuple):
            return ()
        self._next_index += 1
        return ordinary_ids
