"""Answers of the built-in model, with the hidden states that a draft head reads. Knows nothing of heads.

python -m training.draft.answers --out DIR --conversations N [--first N]
python -m training.draft.answers --held-out FILE [--aux 2,4,6]

Each file of DIR has the answers to the prompts of 256 conversations, without prompts that are too long. Half of the
answers are greedy (temperature 0), half sampled at temperature 1. Files that exist are not made again, so that a run
can be stopped at any time.
"""

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_k2.builtin import BUILTIN_FOLDER
from training.conversation import render_prompt
from training.data import held_out, mixed_conversations
from training.draft.target import Target
from training.vocabulary import load_encoding

AUX_LAYERS = (1, 3, 5)
"""Layers whose outputs the head reads."""
DATA_SEED = 22
MAX_TOKENS = 160
_FILE_PROMPTS = 256
_BATCH_ROWS = 64
_MAX_PROMPT_TOKENS = 440


@dataclass(frozen=True)
class Answers:
    """Prompts with the answers to them, row by row.

    ``tokens`` has the ids of a prompt and its answer. ``aux`` (positions, aux layers x hidden) and ``last``
    (positions, hidden) are the states of all positions but that of the last token.
    """

    tokens: list[list[int]]
    num_prompt: list[int]
    temperature: list[float]
    aux: list[mx.array]
    last: list[mx.array]


def answer(target: Target, prompts: Sequence[list[int]], temperature: float, stop: int, key: mx.array) -> Answers:
    """Sample an answer to each prompt, up to and with ``stop``, or of MAX_TOKENS tokens. Temperature 0 is greedy."""
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    padding = [longest - length for length in lengths]
    target.start(padding)
    newest = mx.array([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
    aux, last, written = [], [], []
    is_open = mx.ones((len(prompts),), mx.bool_)
    while len(written) < MAX_TOKENS and mx.any(is_open).item():
        aux_states, last_states = target.run(newest)
        logits = target.logits(last_states[:, -1])
        key, step_key = mx.random.split(key)
        sampled = mx.random.categorical(logits / temperature, key=step_key) if temperature else mx.argmax(logits, -1)
        newest = sampled[:, None]
        mx.eval(newest, aux_states, last_states)
        aux.append(aux_states.astype(mx.float16))
        last.append(last_states.astype(mx.float16))
        written.append(newest)
        is_open = is_open & (newest[:, 0] != stop)
    all_aux, all_last = mx.concatenate(aux, axis=1), mx.concatenate(last, axis=1)
    replies = [_until(row, stop) for row in mx.concatenate(written, axis=1).tolist()]
    ends = [longest + len(reply) - 1 for reply in replies]  # the last token was not run, so it has no states
    return Answers(
        [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)],
        lengths,
        [temperature] * len(prompts),
        [all_aux[row, padding[row] : end] for row, end in enumerate(ends)],
        [all_last[row, padding[row] : end] for row, end in enumerate(ends)],
    )


def _until(row: list[int], stop: int) -> list[int]:
    return row[: row.index(stop) + 1] if stop in row else row


def prompts_of(first: int, count: int) -> Iterator[list[int]]:
    """Yield the prompts of ``count`` conversations, from number ``first`` on, without those that are too long.

    A conversation with tool calls gives the prompt of one of its replies. No held-out question is among them.
    """
    encoding = load_encoding(BUILTIN_FOLDER / "tiktoken.model")
    stream = itertools.islice(mixed_conversations(DATA_SEED, held_out().keys), first, first + count)
    rng = random.Random(first)
    for conversation in stream:
        step = rng.randint(0, len(conversation.exchanges[-1].steps))
        ids = encoding.encode(render_prompt(conversation, step), allowed_special="all")
        if len(ids) <= _MAX_PROMPT_TOKENS:
            yield ids


def held_out_prompts() -> dict[int, list[int]]:
    """Return the prompts of 200 held-out questions by the questions' numbers: every ninth, about 22 of each skill."""
    encoding = load_encoding(BUILTIN_FOLDER / "tiktoken.model")
    questions = held_out().questions
    return {
        number: encoding.encode(
            render_prompt(questions[number].conversation, questions[number].num_steps), allowed_special="all"
        )
        for number in range(0, len(questions), len(questions) // 200)
    }


def make_file(target: Target, path: Path, prompts: Sequence[list[int]], seed: int, *, is_split: bool = True) -> int:
    """Answer prompts, write the answers to a file, and return the number of their tokens.

    Half of the prompts are answered at each temperature, or with ``is_split`` False all of them at both. The seeds
    of two files must be at least their number of prompts apart.
    """
    stop = load_encoding(BUILTIN_FOLDER / "tiktoken.model").encode_single_token("<|im_end|>")
    parts = []
    for temperature in (0, 1):
        part = sorted(prompts, key=len)[temperature::2] if is_split else prompts  # sorted: a batch has similar lengths
        parts += [
            answer(target, part[start : start + _BATCH_ROWS], temperature, stop, mx.random.key(seed + start))
            for start in range(0, len(part), _BATCH_ROWS)
        ]
    arrays = {
        "tokens": mx.array(np.concatenate([row for part in parts for row in part.tokens]).astype(np.int32)),
        "num_tokens": mx.array([len(row) for part in parts for row in part.tokens], mx.int32),
        "num_prompt": mx.array([length for part in parts for length in part.num_prompt], mx.int32),
        "temperature": mx.array([value for part in parts for value in part.temperature], mx.float32),
        "aux": mx.concatenate([row for part in parts for row in part.aux]),
        "last": mx.concatenate([row for part in parts for row in part.last]),
    }
    unfinished = path.with_name(f"part-{path.name}")
    mx.save_safetensors(str(unfinished), arrays)
    unfinished.replace(path)
    return int(mx.sum(arrays["num_tokens"] - arrays["num_prompt"]).item())


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the files")
    parser.add_argument("--conversations", type=int, default=0, help="conversations to answer")
    parser.add_argument(
        "--held-out", type=Path, help="write the answers to 200 held-out questions to this file instead"
    )
    parser.add_argument("--aux", type=_layers, default=AUX_LAYERS, help="layers whose outputs are kept  [1,3,5]")
    parser.add_argument("--first", type=int, default=0, help="number of the first conversation, a multiple of 256")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after the file that ends later than this")
    options = parser.parse_args()
    target = Target(options.aux)
    if options.held_out is not None:
        make_file(target, options.held_out, list(held_out_prompts().values()), 0, is_split=False)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for first in range(options.first, options.first + options.conversations, _FILE_PROMPTS):
        path = options.out / f"{first:07}.safetensors"
        if not path.exists():
            num_tokens = make_file(target, path, list(prompts_of(first, _FILE_PROMPTS)), first)
            print(f"{path.name}: {num_tokens} tokens, {time.monotonic() - began:.0f} s", file=sys.stderr)
        if time.monotonic() - began > options.seconds:
            return


if __name__ == "__main__":
    main()
