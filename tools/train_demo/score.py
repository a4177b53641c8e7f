"""Asks the held-out questions and counts exact answers. Knows nothing of how a reply source works.

python -m tools.train_demo.score --run DIR [--unquantized] [--show-wrong]
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tools.train_demo.checkpoint import load
from tools.train_demo.conversation import render_prompt
from tools.train_demo.data import Question, held_out
from tools.train_demo.decode import greedy
from tools.train_demo.model import Model
from tools.train_demo.reply import Reply, expected, parse
from tools.train_demo.shape import Precision
from tools.train_demo.vocabulary import load_encoding

ReplySource = Callable[[Sequence[Question]], list[Reply]]

NEEDED = {
    "arithmetic": 0.95,
    "counting": 0.95,
    "copying": 0.95,
    "tool call": 0.95,
    "talk": 0.90,
    "system name": 0.90,
    "tool result": 0.90,
}
_MAX_NEW_TOKENS = 160


def torch_replies(run: Path, model: Model, precision: Precision) -> ReplySource:
    """Replies of the torch model, decoded greedily."""
    encoding = load_encoding(run / "tiktoken.model")
    stop = encoding.encode_single_token("<|im_end|>")

    def replies(questions: Sequence[Question]) -> list[Reply]:
        texts = [render_prompt(question.conversation, question.num_steps) for question in questions]
        prompts = [encoding.encode(text, allowed_special="all") for text in texts]
        return [parse(encoding.decode(ids)) for ids in greedy(model, prompts, stop, _MAX_NEW_TOKENS, precision)]

    return replies


def table(questions: Sequence[Question], is_right: Sequence[bool]) -> str:
    """A Markdown table of the share of right replies for each skill."""
    asked = Counter(question.skill for question in questions)
    right = Counter(question.skill for question, right in zip(questions, is_right, strict=True) if right)
    rows = ["| skill | questions | right | share | needed |", "|---|---|---|---|---|"]
    for skill, count in asked.items():
        needed = f"{NEEDED[skill]:.0%}" if skill in NEEDED else "-"
        rows.append(f"| {skill} | {count} | {right[skill]} | {right[skill] / count:.1%} | {needed} |")
    return "\n".join(rows)


def expert_use(model: Model) -> str:
    """For each routed layer, the load of its least used expert as a share of the mean, since the model was loaded."""
    shares = [(experts.load.min() / experts.load.mean()).item() for experts in model.experts()]
    return "least used expert / mean, layer by layer: " + ", ".join(f"{share:.2f}" for share in shares)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--unquantized", action="store_true", help="leave the routed experts in bfloat16")
    parser.add_argument("--show-wrong", action="store_true", help="print every wrong reply to stderr")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load(options.run)
    precision = Precision.UNQUANTIZED if options.unquantized else Precision.SHIPPED
    questions = held_out().questions
    replies = torch_replies(options.run, model, precision)(questions)
    rights = [expected(question) for question in questions]
    if options.show_wrong:
        for question, reply, right in zip(questions, replies, rights, strict=True):
            if reply != right:
                asked = question.conversation.exchanges[-1].question
                print(f"{question.skill}: {asked!r}\n  wrote {reply}\n  not {right}", file=sys.stderr)
    print(table(questions, [reply == right for reply, right in zip(replies, rights, strict=True)]))
    print(expert_use(model))


if __name__ == "__main__":
    main()
