"""Batches of answers from files, for the training of a head. Knows nothing of the head."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from training.draft.head import Batch

_LENGTHS, _QUERIES = 32, 16
"""Lengths and numbers of queries are rounded up to multiples of these, so that few shapes occur."""


@dataclass(frozen=True)
class Row:
    """One prompt and its answer: all tokens, and the states of all positions but the last."""

    tokens: NDArray[np.int32]
    num_prompt: int
    temperature: float
    aux: NDArray[np.float16]
    last: NDArray[np.float16]


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Return the rows of files that `training.draft.answers` wrote.

    Answers of fewer than two tokens are left out: the head's first prediction is an answer's second token.
    """
    rows = []
    for path in paths:
        arrays = {name: np.asarray(array) for name, array in mx.load(str(path)).items()}
        token = state = 0
        for count, num_prompt, temperature in zip(
            arrays["num_tokens"].tolist(), arrays["num_prompt"].tolist(), arrays["temperature"].tolist(), strict=True
        ):
            states = slice(state, state + count - 1)
            if count - num_prompt >= 2:
                tokens = arrays["tokens"][token : token + count]
                rows.append(Row(tokens, num_prompt, temperature, arrays["aux"][states], arrays["last"][states]))
            token, state = token + count, state + count - 1
    return rows


def endless_batches(rows: Sequence[Row], norm: mx.array, eps: float, most_tokens: int, seed: int) -> Iterator[Batch]:
    """Yield all rows again and again, in batches of similar length with at most ``most_tokens`` positions."""
    rng = random.Random(seed)
    while True:
        parts: list[list[Row]] = [[]]
        # The random part gives each round through the rows other batches.
        for row in sorted(rows, key=lambda row: len(row.tokens) + rng.random() * _LENGTHS):
            if (len(parts[-1]) + 1) * _rounded(len(row.tokens), _LENGTHS) > most_tokens:
                parts.append([])
            parts[-1].append(row)
        rng.shuffle(parts)
        for part in parts:
            yield make_batch(part, norm, eps)


def make_batch(rows: Sequence[Row], norm: mx.array, eps: float) -> Batch:
    """Return rows as one batch. ``norm`` and ``eps`` are weight and epsilon of the model's last norm.

    Position t predicts token t + 2 (head.py). So the last two tokens have no position, and the queries begin one
    position before the answer, with the prediction of its second token.
    """
    length = _rounded(max(len(row.tokens) for row in rows) - 2, _LENGTHS)
    num_queries = [len(row.tokens) - row.num_prompt - 1 for row in rows]
    most = _rounded(max(num_queries), _QUERIES)
    aux = np.zeros((len(rows), length, rows[0].aux.shape[-1]), np.float16)
    next_ids = np.zeros((len(rows), length), np.int32)
    queries = np.zeros((len(rows), most), np.int32)
    target = np.zeros((len(rows), most, rows[0].last.shape[-1]), np.float16)
    for index, (row, count) in enumerate(zip(rows, num_queries, strict=True)):
        used = len(row.tokens) - 2
        aux[index, :used] = row.aux[:used]
        next_ids[index, :used] = row.tokens[1:-1]
        first = row.num_prompt - 1
        queries[index, :count] = np.arange(first, first + count)
        queries[index, count:] = first + count - 1  # padding: any valid position
        target[index, :count] = row.last[first + 1 : first + 1 + count]
    is_real = np.arange(most) < np.array(num_queries)[:, None]
    normed = mx.fast.rms_norm(mx.array(target).astype(mx.float32), norm, eps)
    return Batch(mx.array(aux).astype(mx.float32), mx.array(next_ids), mx.array(queries), mx.array(is_real), normed)


def _rounded(value: int, step: int) -> int:
    return max(step, -(-value // step) * step)
