"""Scores of a training run's model in torch before its export, and the use of its least used experts.

python -m training.score_run --run DIR [--unquantized] [--save-replies FILE] [--show-wrong]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from training.checkpoint import load_frozen
from training.data import held_out
from training.model import Model
from training.reply import parse
from training.table import table, wrong
from training.torch_source import Transcript, transcripts

_SAVE_EVERY = 12  # the interval of the replies saved for verify.py


def expert_use(model: Model) -> str:
    """Return a line with each layer's load of its least used expert / mean load, counted since the model was loaded."""
    fractions = [(experts.load.min() / experts.load.mean()).item() for experts in model.experts()]
    return "least used expert / mean, layer by layer: " + ", ".join(f"{fraction:.2f}" for fraction in fractions)


def save_replies(path: Path, written: Sequence[Transcript]) -> None:
    """Write every 12th prompt and reply as token ids, one JSON object per line."""
    lines = (json.dumps({"prompt": each.prompt, "reply": each.reply}) for each in written[::_SAVE_EVERY])
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--unquantized", action="store_true", help="leave the routed experts in bfloat16")
    parser.add_argument("--save-replies", type=Path, help="write some prompts and replies as token ids, for verify.py")
    parser.add_argument("--show-wrong", action="store_true", help="print every wrong reply to stderr")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_frozen(options.run, is_quantized=not options.unquantized)
    questions = held_out().questions
    written = transcripts(options.run, model, questions)
    if options.save_replies:
        save_replies(options.save_replies, written)
    replies = [parse(each.text) for each in written]
    if options.show_wrong:
        print("\n".join(wrong(questions, replies)), file=sys.stderr)
    print(table(questions, replies))
    print(expert_use(model))


if __name__ == "__main__":
    main()
