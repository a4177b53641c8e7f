"""Scores of replies to the held-out questions. Knows nothing of how replies are generated."""

from collections import Counter
from collections.abc import Iterator, Sequence

from training.data import Question
from training.reply import Reply, expected

NEEDED = {  # share of right replies; other skills are only reported
    "arithmetic": 0.95,
    "counting": 0.95,
    "copying": 0.95,
    "tool call": 0.95,
    "talk": 0.90,
    "system name": 0.90,
    "tool result": 0.90,
}


def table(questions: Sequence[Question], replies: Sequence[Reply]) -> str:
    """Return a Markdown table of the fraction of right replies for each skill."""
    counts = Counter(question.skill for question in questions)
    pairs = zip(questions, replies, strict=True)
    right = Counter(question.skill for question, reply in pairs if reply == expected(question))
    rows = ["| skill | questions | right | share | needed |", "|---|---|---|---|---|"]
    for skill, count in counts.items():
        needed = f"{NEEDED[skill]:.0%}" if skill in NEEDED else "-"
        rows.append(f"| {skill} | {count} | {right[skill]} | {right[skill] / count:.1%} | {needed} |")
    return "\n".join(rows)


def wrong(questions: Sequence[Question], replies: Sequence[Reply]) -> Iterator[str]:
    """Yield a paragraph about each wrong reply."""
    for question, reply in zip(questions, replies, strict=True):
        right = expected(question)
        if reply != right:
            question_text = question.conversation.exchanges[-1].question
            yield f"{question.skill}: {question_text!r}\n  wrote {reply}\n  not {right}"
