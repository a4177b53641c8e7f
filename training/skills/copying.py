"""Tasks to repeat words exactly, reverse them, or sort numbers. Knows nothing of other skills."""

import random

from training.conversation import Exchange
from training.task import Task, text_key
from training.words import any_word, made_up

_COPY = (
    "Repeat: {words}", "Repeat after me: {words}", "Say this: {words}", "Copy this: {words}",
    "Copy these words: {words}",
    "Please repeat these words: {words}", "Write exactly this: {words}", "Can you repeat this? {words}",
    "Echo: {words}", "Say {words}",
)  # fmt: skip
_TIMES = ("Say {word} {count} times.", "Write {word} {count} times.", "Repeat {word} {count} times.")
_OVER = ("Say this {count} times: {words}", "Repeat {count} times: {words}", "{count} times, please: {words}")
_BACKWARDS = ("Reverse this list: {words}", "Say these words backwards: {words}", "Turn this list round: {words}")
_SORT = ("Sort these numbers: {words}", "Put these numbers in order: {words}", "Sort: {words}")


def copying(rng: random.Random) -> Task:
    """Return a task to repeat 2 to 10 words once, or one word several times."""
    if rng.random() < 0.12:
        return copying_one_word(rng)
    return _copied(rng, [any_word(rng) for _ in range(rng.randint(2, 10))])


def copying_one_word(rng: random.Random) -> Task:
    """Return a task to repeat one word 2 to 6 times."""
    word, count = any_word(rng), rng.randint(2, 6)
    question = rng.choice(_TIMES).format(word=word, count=count)
    return Task(text_key(question), Exchange(question, f"{word}, {count} times.", " ".join([word] * count)))


def copying_much(rng: random.Random) -> Task:
    """Return a task to repeat 8 to 30 words. More of them are made up than in `copying`, with recurring syllables."""
    words = [made_up(rng) if rng.random() < 0.4 else any_word(rng) for _ in range(rng.randint(8, 30))]
    return _copied(rng, words)


def repeating(rng: random.Random) -> Task:
    """Return a task to repeat 1 to 5 words 2 to 4 times, so that few tokens give much to copy."""
    words = " ".join(any_word(rng) for _ in range(rng.randint(1, 5)))
    count = rng.randint(2, 4)
    question = rng.choice(_OVER).format(words=words, count=count)
    think = f"I repeat the words {count} times."
    return Task(text_key(question), Exchange(question, think, ", ".join([words] * count)))


def arranging(rng: random.Random) -> Task:
    """Return a task to reverse words or to sort numbers."""
    if rng.random() < 0.5:
        words = [any_word(rng) for _ in range(rng.randint(2, 6))]
        question = rng.choice(_BACKWARDS).format(words=", ".join(words))
        return Task(text_key(question), Exchange(question, "I start with the last word.", ", ".join(reversed(words))))
    numbers = rng.sample(range(100), rng.randint(3, 6))
    question = rng.choice(_SORT).format(words=", ".join(str(number) for number in numbers))
    ordered = ", ".join(str(number) for number in sorted(numbers))
    return Task(text_key(question), Exchange(question, "I start with the smallest number.", ordered))


def _copied(rng: random.Random, words: list[str]) -> Task:
    text = (", " if rng.random() < 0.3 else " ").join(words)
    question = rng.choice(_COPY).format(words=text)
    return Task(text_key(question), Exchange(question, "I repeat the words as they are.", text))
