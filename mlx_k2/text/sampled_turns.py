"""Prompts in which the model's own turns stand as the very tokens that it drew. Knows no messages and no template.

A text can be cut into tokens in many ways, and a model does not always draw what the tokenizer would choose. The cache
holds what was drawn, and a prompt that spelled it otherwise would not find it there.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TypeAlias

from mlx_k2.text.prompt import PromptPiece
from mlx_k2.text.tokenizer import Tokenizer

_TURN, _BODY, _END = "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"

_SampledTurn: TypeAlias = tuple[tuple[int, ...] | int, ...]
"""A turn's tokens: control tokens, and the stretches of ordinary ones between them."""


class SampledTurns:
    """What the model drew for assistant turns, by their number in the conversation, counted from 0."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._turn_id, self._body_id, self._end_id = map(tokenizer.special_ids.get, (_TURN, _BODY, _END))
        self._sampled: dict[int, _SampledTurn] = {}
        self._encoded: dict[str, list[int]] = {}

    def keep(self, turn: int, token_ids: Iterable[int]) -> None:
        """The model drew ``token_ids`` for this turn."""
        sampled: list[tuple[int, ...] | int] = []
        for is_special, run in groupby(token_ids, self._tokenizer.is_special):
            tokens = tuple(run)
            sampled += tokens if is_special else (tokens,)
        self._sampled[turn] = tuple(sampled)

    def forget_from(self, turn: int) -> None:
        """The conversation ends before this turn now."""
        self._sampled = {number: sampled for number, sampled in self._sampled.items() if number < turn}

    def encode(self, pieces: Sequence[PromptPiece]) -> list[int]:
        """The token ids of a rendered conversation, whose assistant turns are counted as they stand there.

        Text of a turn that was drawn keeps its tokens up to where the template changed it; from there on, and
        everywhere else, it is encoded as the tokenizer would. A control token is itself.
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
        """``text`` as it was drawn, and from a change on encoded; nothing where its beginning is another one."""
        data = text.encode()
        kept: list[int] = []
        end = 0
        for token_id in sampled:
            token = self._tokenizer.token_bytes(token_id)
            if not data.startswith(token, end):
                break
            kept.append(token_id)
            end += len(token)
        while kept and not _is_whole(data, end):
            end -= len(self._tokenizer.token_bytes(kept.pop()))
        return [*kept, *self._tokenizer.encode_text(data[end:].decode())] if kept else []

    def _encode(self, text: str, encoded: dict[str, list[int]]) -> list[int]:
        """As the tokenizer would; what the last conversation had is looked up."""
        ids = self._encoded.get(text)
        encoded[text] = self._tokenizer.encode_text(text) if ids is None else ids
        return encoded[text]


class _Body:
    """How far a rendered turn has come in what was drawn for it."""

    def __init__(self, sampled: _SampledTurn) -> None:
        self._sampled = sampled
        self._next = 0

    def pass_control(self, token_id: int) -> None:
        """Go behind this token, if it was drawn; what was drawn before it is not in the rendering."""
        if token_id in self._sampled[self._next :]:
            self._next = self._sampled.index(token_id, self._next) + 1

    def pass_text(self) -> tuple[int, ...]:
        """The stretch that was drawn here; none where no text was."""
        stretch = self._sampled[self._next] if self._next < len(self._sampled) else None
        if not isinstance(stretch, tuple):
            return ()
        self._next += 1
        return stretch


def _is_whole(data: bytes, end: int) -> bool:
    """Whether no character of ``data`` is cut at ``end``."""
    return end == len(data) or data[end] & 0xC0 != 0x80
