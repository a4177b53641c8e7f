"""Prompts in which the model's own turns keep the tokens that it sampled. Knows no messages and no template.

A text can be tokenized in many ways, and a model does not always sample the tokens that the tokenizer would choose. The
cache holds the sampled tokens, and a prompt with other tokens for the same text would not match them.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TypeAlias

from mlx_k2.text.prompt import PromptPiece
from mlx_k2.text.tokenizer import Tokenizer

_TURN, _BODY, _END = "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"

_SampledTurn: TypeAlias = tuple[tuple[int, ...] | int, ...]
"""A turn's tokens: control tokens, and the runs of ordinary tokens between them."""


class SampledTurns:
    """The sampled tokens of assistant turns, by the turn's number in the conversation, counted from 0."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._turn_id, self._body_id, self._end_id = map(tokenizer.special_ids.get, (_TURN, _BODY, _END))
        self._sampled: dict[int, _SampledTurn] = {}
        self._encoded: dict[str, list[int]] = {}

    def keep(self, turn: int, token_ids: Iterable[int]) -> None:
        """Store ``token_ids`` as the sampled tokens of this turn."""
        sampled: list[tuple[int, ...] | int] = []
        for is_special, run in groupby(token_ids, self._tokenizer.is_special):
            tokens = tuple(run)
            sampled += tokens if is_special else (tokens,)
        self._sampled[turn] = tuple(sampled)

    def forget_from(self, turn: int) -> None:
        """Remove the sampled tokens of this turn and all later ones."""
        self._sampled = {number: sampled for number, sampled in self._sampled.items() if number < turn}

    def encode(self, pieces: Sequence[PromptPiece]) -> list[int]:
        """Return the token ids of a rendered conversation, whose assistant turns are counted in order from 0.

        Text of a sampled turn keeps its tokens up to where the template changed it. From there on, and everywhere
        else, the tokenizer encodes it. A control token keeps its id.
        """
        ids: list[int] = []
        encoded: dict[str, list[int]] = {}
        turn, in_head, body = -1, False, _Body(())
        for piece in pieces:
            if isinstance(piece, str):
                ids += self._kept(body.pass_text(), piece) or self._encode(piece, encoded)
                continue
            ids.append(piece)
            if piece == self._turn_id:
                turn, in_head = turn + 1, True
            elif piece == self._body_id and in_head:
                body, in_head = _Body(self._sampled.get(turn, ())), False
            elif piece == self._end_id:
                body = _Body(())
            else:
                body.pass_control(piece)
        self._encoded = encoded
        return ids

    def _kept(self, sampled: tuple[int, ...], text: str) -> list[int]:
        """Return the sampled tokens that ``text`` begins with, then the rest encoded; [] if it begins with none."""
        data = text.encode()
        kept: list[int] = []
        end = 0
        for token_id in sampled:
            token = self._tokenizer.token_bytes(token_id)
            if not data.startswith(token, end):
                break
            kept.append(token_id)
            end += len(token)
        while kept and end < len(data) and data[end] & 0xC0 == 0x80:  # ``end`` is inside a UTF-8 character
            end -= len(self._tokenizer.token_bytes(kept.pop()))
        return [*kept, *self._tokenizer.encode_text(data[end:].decode())] if kept else []

    def _encode(self, text: str, encoded: dict[str, list[int]]) -> list[int]:
        """Return the tokenizer's ids for ``text``, looked up if the previous ``encode`` contained it."""
        ids = self._encoded.get(text)
        encoded[text] = self._tokenizer.encode_text(text) if ids is None else ids
        return encoded[text]


class _Body:
    """The position of a rendered turn in its sampled tokens."""

    def __init__(self, sampled: _SampledTurn) -> None:
        self._sampled = sampled
        self._next = 0

    def pass_control(self, token_id: int) -> None:
        """Move past this token if it was sampled. The sampled tokens before it are not in the rendering."""
        if token_id in self._sampled[self._next :]:
            self._next = self._sampled.index(token_id, self._next) + 1

    def pass_text(self) -> tuple[int, ...]:
        """Return the run of ordinary tokens sampled here and move past it; () if there is none."""
        stretch = self._sampled[self._next] if self._next < len(self._sampled) else None
        if not isinstance(stretch, tuple):
            return ()
        self._next += 1
        return stretch
