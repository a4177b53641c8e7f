"""A check that no held-out question occurs in the training text.

python -m training.check_data --conversations N

Compares the text of the questions in the conversations, so it does not rely on the keys that exclude them.
"""

import argparse
import itertools
import sys

from training.conversation import Conversation
from training.data import TRAINING_SEED, conversations, held_out
from training.task import text_key


def question_keys(conversation: Conversation, skill: str | None) -> set[str]:
    """Return text keys of a conversation's questions. Those of "system name" include the system prompt."""
    texts = {text_key(exchange.question) for exchange in conversation.exchanges}
    if skill == "system name":
        return {text_key(f"{conversation.system} {text}") for text in texts}
    return texts


def main() -> None:
    """Run the command. Exit with code 1 if a held-out question was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, required=True, help="number that the training read")
    options = parser.parse_args()
    kept = held_out()
    held: dict[str | None, set[str]] = {}
    for question in kept.questions:
        skill = question.skill if question.skill == "system name" else None  # None: any skill without a system prompt
        held.setdefault(skill, set()).update(question_keys(question.conversation, skill))
    num_found = 0
    for conversation in itertools.islice(conversations(TRAINING_SEED, kept.keys), options.conversations):
        found = [text for skill, texts in held.items() for text in question_keys(conversation, skill) & texts]
        num_found += len(found)
        if found:
            print(f"held out, and in the training text: {found}", file=sys.stderr)
    print(f"{options.conversations} conversations: {num_found} held-out questions among them")
    sys.exit(num_found > 0)


if __name__ == "__main__":
    main()
