"""Scores of the model after possible mistakes of a loader, as reference for tests. Knows nothing of loaders.

python -m training.damage --run DIR [--questions N]
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from training.checkpoint import load_frozen
from training.data import QUESTIONS_PER_SKILL, Question, held_out
from training.model import Layer, Model
from training.quantize import dequantize, quantize
from training.reply import expected, parse
from training.rope import yarn_frequencies
from training.torch_source import transcripts

_WRONG_BETA_FAST = 32.0


def unchanged(model: Model) -> None:
    """Do nothing: the baseline of the comparison."""


def omit_a_layer(model: Model) -> None:
    """Remove the middle layer."""
    layers = model.decoder_layers()
    del layers[len(layers) // 2]
    _set_layers(model, layers)


def swap_two_layers(model: Model) -> None:
    """Swap the layers before and after the middle layer."""
    layers = model.decoder_layers()
    middle = len(layers) // 2
    layers[middle - 1], layers[middle + 1] = layers[middle + 1], layers[middle - 1]
    _set_layers(model, layers)


def reverse_nibbles(model: Model) -> None:
    """Reverse the order of the eight codes of each packed word."""
    for experts in model.experts():
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight.data.copy_(_reversed_nibbles(weight.data))


def use_usual_beta_fast(model: Model) -> None:
    """Use YaRN's usual beta_fast of 32 instead of K2's 1."""
    model.frequencies.copy_(yarn_frequencies(replace(model.shape, rope_beta_fast=_WRONG_BETA_FAST)))


_DAMAGES: tuple[Callable[[Model], None], ...] = (
    unchanged,
    omit_a_layer,
    swap_two_layers,
    reverse_nibbles,
    use_usual_beta_fast,
)


def fraction_right(run: Path, damage: Callable[[Model], None], questions: list[Question]) -> float:
    """Return the fraction of right replies of the damaged model."""
    model = load_frozen(run, is_quantized=True)
    damage(model)
    pairs = zip(questions, transcripts(run, model, questions), strict=True)
    return sum(parse(written.text) == expected(question) for question, written in pairs) / len(questions)


def _reversed_nibbles(weight: Tensor) -> Tensor:
    codes, scale = quantize(weight)
    return dequantize(codes.unflatten(-1, (-1, 8)).flip(-1).flatten(-2), scale)


def _set_layers(model: Model, layers: list[Layer]) -> None:
    model.layers = nn.ModuleList(layers)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--questions", type=int, default=20, help="held-out questions per skill  [default: 20]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    questions = [
        question
        for number, question in enumerate(held_out().questions)
        if number % QUESTIONS_PER_SKILL < options.questions
    ]
    print("| damage | right |\n|---|---|")
    for damage in _DAMAGES:
        print(f"| {damage.__name__.replace('_', ' ')} | {fraction_right(options.run, damage, questions):.1%} |")


if __name__ == "__main__":
    main()
