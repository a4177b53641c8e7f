"""Scores of an exported checkpoint through `mlx-k2 generate --prompts`. Knows nothing of torch or training.

python -m training.score [--model DIR] [--stages N] [--show-wrong] [--save]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.measure import replace_generated
from training.conversation import DEFAULT_SYSTEM, Conversation, Json, declare
from training.data import Question, held_out
from training.reply import Reply
from training.table import table, wrong

_MAX_TOKENS = 160
_CARD = Path("docs/model-card.md")


def messages(conversation: Conversation, num_steps: int) -> list[dict[str, Json]]:
    """Return the messages of a prompt.

    Tools are declared in the message that the chat template would render, so that no grammar helps with the calls.
    """
    plain = conversation.messages(num_steps)
    if not conversation.tools:
        return plain
    declaration: dict[str, Json] = {"role": "system", "name": "tool_declare", "content": declare(conversation.tools)}
    if conversation.system is None:
        return [declaration, {"role": "system", "content": DEFAULT_SYSTEM}, *plain]
    return [declaration, *plain]


def command_replies(options: list[str], questions: Sequence[Question]) -> list[Reply]:
    """Return the command's reply to each question."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, results = Path(folder, "prompts.jsonl"), Path(folder, "results.jsonl")
        lines = ({"messages": messages(question.conversation, question.num_steps)} for question in questions)
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        files = ["--prompts", str(prompts), "--out", str(results)]
        limits = ["--temperature", "0", "--max-tokens", str(_MAX_TOKENS)]
        program = Path(sys.executable).with_name("mlx-k2")
        subprocess.run([program, "generate", *files, *limits, *options], check=True)
        return [_reply(json.loads(line)) for line in results.read_text().splitlines()]


def _reply(result: dict[str, Json]) -> Reply:
    calls = result.get("tool_calls") or []
    assert isinstance(calls, list)
    return Reply(str(result.get("text")), tuple(_call(call) for call in calls))


def _call(call: Json) -> tuple[str, Json]:
    assert isinstance(call, dict)
    arguments = call["arguments"]
    try:
        return str(call["name"]), json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return str(call["name"]), arguments  # not JSON: never equal to expected arguments


def save(scores: str) -> None:
    """Write the table into the model card."""
    _CARD.write_text(replace_generated(_CARD.read_text(), "python -m training.score --save", scores))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a checkpoint  [default: the command's own]")
    parser.add_argument("--stages", type=int, default=2, help="local stages  [default: 2]")
    parser.add_argument("--show-wrong", action="store_true", help="print every wrong reply to stderr")
    parser.add_argument("--save", action="store_true", help="put the table into docs/model-card.md")
    options = parser.parse_args()
    questions = held_out().questions
    model = ["--model", str(options.model)] if options.model else []
    replies = command_replies(["--stages", str(options.stages), *model], questions)
    if options.show_wrong:
        print("\n".join(wrong(questions, replies)), file=sys.stderr)
    scores = table(questions, replies)
    print(scores)
    if options.save:
        save(scores)


if __name__ == "__main__":
    main()
