"""The acceptance of a draft head on answers to held-out questions, by skill, beside that of n-grams.

python -m training.draft.measure --answers FILE --run DIR [--save]

The acceptance is the share of an answer's positions whose token is drafted right from all tokens before it. An answer's
first token, which no head drafts, and its stop token are left out. At temperature 1 the head's draft is compared with a
token that the model samples with the same noise, as in the program. A draft of the stop token counts as wrong.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from bench.measure import replace_generated
from mlx_k2.builtin import BUILTIN_FOLDER
from mlx_k2.scheduling.drafter import NgramDrafter
from training.data import held_out
from training.draft.answers import held_out_prompts
from training.draft.data import Row, make_batch, read_rows
from training.draft.head import HeadForward, Weights
from training.draft.train import outer_weights, read_weights
from training.vocabulary import load_encoding

_CARD = Path("docs/model-card.md")
_NOISE_SEED = 5
_SURE = 0.9
"""Positions where the model's best token has a lower probability are also counted apart."""


@dataclass(frozen=True)
class Position:
    """One position of an answer: what drafted it right, and the probability of the model's best token."""

    skill: str
    temperature: int
    is_head_right: bool
    is_ngram_right: bool
    best: float


def positions(rows: Sequence[tuple[str, Row]], weights: Weights) -> Iterator[Position]:
    """Yield the positions of all answers from the second token on, without the stop token."""
    config, embedding, norm, head = outer_weights()
    forward = HeadForward(config, embedding, head)
    stop = load_encoding(BUILTIN_FOLDER / "tiktoken.model").encode_single_token("<|im_end|>")
    for index, (skill, row) in enumerate(rows):
        batch = make_batch([row], norm, config.rms_norm_eps)
        (logits,) = forward.logits(weights, batch, 1)
        target = forward.target_logits(batch.target)
        best = mx.max(mx.softmax(target, axis=-1), axis=-1)
        noise = mx.random.gumbel(logits.shape, key=mx.random.key(_NOISE_SEED + index)) * row.temperature  # 0 or 1
        drafted, sampled = (np.asarray(mx.argmax(x + noise, axis=-1)[0]) for x in (logits, target))
        ngrams = ngram_drafts(row.tokens.tolist(), row.num_prompt + 1)
        for at, (ngram, token_id) in enumerate(zip(ngrams, row.tokens[row.num_prompt + 1 :].tolist(), strict=True)):
            if token_id == stop:
                continue
            is_right = drafted[at] == sampled[at] != stop
            yield Position(skill, int(row.temperature), bool(is_right), ngram == token_id, best[0, at].item())


def ngram_drafts(tokens: list[int], first: int) -> list[int | None]:
    """Return the n-gram drafter's token for each position from ``first`` on."""
    drafter = NgramDrafter()
    found: list[int | None] = []
    for end in range(first, len(tokens)):
        drafter.index(tokens[:end], len(tokens))
        found.append(drafter.draft(tokens[:end], ()))
    return found


def table(found: Sequence[Position]) -> str:
    """Return the shares by temperature and skill as a Markdown table."""
    lines = [
        f"| temperature | skill | positions | n-grams | head | best < {_SURE} | head there |",
        "|---|---|---|---|---|---|---|",
    ]
    for temperature in (0, 1):
        groups: dict[str, list[Position]] = defaultdict(list)
        for position in found:
            if position.temperature == temperature:
                groups[position.skill].append(position)
        groups["all"] = [position for group in groups.values() for position in group]
        lines += [_line(temperature, skill, group) for skill, group in groups.items()]
    return "\n".join(lines)


def _line(temperature: int, skill: str, group: Sequence[Position]) -> str:
    unsure = [position for position in group if position.best < _SURE]
    ngrams = sum(position.is_ngram_right for position in group) / len(group)
    head = sum(position.is_head_right for position in group) / len(group)
    there = f"{sum(position.is_head_right for position in unsure) / len(unsure):.3f}" if unsure else "-"
    return f"| {temperature} | {skill} | {len(group)} | {ngrams:.3f} | {head:.3f} | {len(unsure)} | {there} |"


def held_out_rows(path: Path) -> list[tuple[str, Row]]:
    """Return the answers of ``training.draft.answers --held-out``, each with its skill."""
    questions = held_out().questions
    skills = {tuple(ids): questions[number].skill for number, ids in held_out_prompts().items()}
    return [(skills[tuple(row.tokens[: row.num_prompt].tolist())], row) for row in read_rows([path])]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=Path, required=True, help="file of training.draft.answers --held-out")
    parser.add_argument("--run", type=Path, required=True, help="folder of the training run, or of a head")
    parser.add_argument("--save", action="store_true", help="put the table into docs/model-card.md")
    options = parser.parse_args()
    found = table(list(positions(held_out_rows(options.answers), read_weights(options.run))))
    print(found)
    if options.save:
        _CARD.write_text(replace_generated(_CARD.read_text(), "python -m training.draft.measure --save", found))


if __name__ == "__main__":
    main()
