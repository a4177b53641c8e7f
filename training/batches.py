"""Conversations as padded batches of token ids. Knows nothing of skills or of the model."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import tiktoken
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from training.conversation import Conversation, render

MAX_TOKENS = 512  # longer conversations are left out
_BATCH_TOKENS = 4096
_POOL = 2048
_LENGTHS, _TARGETS = 16, 256  # lengths and numbers of targets are rounded up to multiples of these
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Token ids (rows, length), padded on the right to few shapes, because each new shape of a product costs extra."""

    tokens: Tensor
    is_real: Tensor
    where: Tensor  # flat indices of the tokens whose next token the model has to predict
    targets: Tensor  # the next tokens of `where`, or IGNORED where `where` is padded
    consumed: int  # conversations read from the stream so far, with those of the pool's later batches


def encode(encoding: tiktoken.Encoding, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """Return the ids of the whole conversation and, for each id, whether it is part of a reply."""
    tokens: list[int] = []
    targets: list[bool] = []
    for piece in render(conversation):
        ids = encoding.encode(piece.text, allowed_special="all")
        tokens += ids
        targets += [piece.is_reply] * len(ids)
    return tokens, targets


def batches(stream: Iterator[Conversation], encoding: tiktoken.Encoding, consumed: int) -> Iterator[Batch]:
    """Yield batches of conversations of similar length, shuffled within a pool. Skip the first `consumed` ones."""
    stream = itertools.islice(stream, consumed, None)
    while True:
        pool = [encode(encoding, conversation) for conversation in itertools.islice(stream, _POOL)]
        consumed += len(pool)
        rows = sorted((row for row in pool if len(row[0]) <= MAX_TOKENS), key=lambda row: len(row[0]))
        cut = list(_cut(rows))
        random.Random(consumed).shuffle(cut)
        for part in cut:
            yield _pad(part, consumed)


def _cut(rows: list[tuple[list[int], list[bool]]]) -> Iterator[list[tuple[list[int], list[bool]]]]:
    part: list[tuple[list[int], list[bool]]] = []
    for row in rows:  # ascending, so the current row is the longest
        if (len(part) + 1) * _rounded(len(row[0])) > _BATCH_TOKENS:
            yield part
            part = []
        part.append(row)
    yield part


def _rounded(length: int) -> int:
    return -(-length // _LENGTHS) * _LENGTHS


def _pad(rows: list[tuple[list[int], list[bool]]], consumed: int) -> Batch:
    length = _rounded(max(len(tokens) for tokens, _ in rows))
    shape = (_BATCH_TOKENS // length, length + 1)
    tokens = torch.zeros(shape, dtype=torch.long)
    is_real, is_target = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for index, (ids, targets) in enumerate(rows):
        tokens[index, : len(ids)] = torch.tensor(ids)
        is_real[index, : len(ids)] = True
        is_target[index, : len(ids)] = torch.tensor(targets)
    inputs, following = tokens[:, :-1], tokens[:, 1:]
    where = is_target[:, 1:].flatten().nonzero().flatten()
    spare = -len(where) % _TARGETS
    return Batch(
        inputs,
        is_real[:, :-1],
        F.pad(where, (0, spare)),
        F.pad(following.flatten()[where], (0, spare), value=IGNORED),
        consumed,
    )
