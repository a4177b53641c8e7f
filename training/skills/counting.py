"""Tasks to count up, down, in steps, and to count words. Knows nothing of other skills."""

import itertools
import random

from training.conversation import Exchange
from training.task import Task, text_key
from training.words import any_word

_UP = (
    "Count from {a} to {b}.", "Please count from {a} to {b}.", "Can you count from {a} to {b}?",
    "Count up from {a} to {b}.", "Write the numbers from {a} to {b}.", "List the numbers from {a} to {b}.",
    "Say the numbers from {a} to {b}.",
)  # fmt: skip
_DOWN = ("Count down from {a} to {b}.", "Please count down from {a} to {b}.", "Can you count down from {a} to {b}?",
         "Count backwards from {a} to {b}.")  # fmt: skip
_STEPS = ("Count from {a} to {b} in steps of {step}.", "Count by {step} from {a} to {b}.",
          "Go from {a} to {b} in steps of {step}.")  # fmt: skip
_HOW_MANY = (
    "How many words are in this list: {words}?", "Count the words: {words}.", "How many words do you see: {words}?",
    "How many words are there: {words}?",
)  # fmt: skip
_HOW_OFTEN = (
    "How often does {word} appear in: {words}?", "How many times does {word} occur in: {words}?",
    "Count {word} in this list: {words}.",
)  # fmt: skip


def counting(rng: random.Random) -> Task:
    """Return a task of one of the kinds of counting."""
    kind = rng.random()
    if kind < 0.35:
        return _range(rng, rng.choice(_UP), 1)
    if kind < 0.5:
        return _range(rng, rng.choice(_DOWN), -1)
    if kind < 0.7:
        return counting_in_steps(rng)
    if kind < 0.88:
        return _words_counted(rng, [any_word(rng) for _ in range(rng.randint(2, 12))])
    return counting_one_word(rng)


def counting_in_steps(rng: random.Random) -> Task:
    """Return a task to count from one number to another in steps of more than one."""
    return _range(rng, rng.choice(_STEPS), rng.choice((2, 2, 3, 5, 5, 10)))


def counting_far(rng: random.Random) -> Task:
    """Return a task with 9 to 15 numbers. The end's last digit can recur, which makes the model stop too early."""
    templates, steps = rng.choice(((_UP, (1,)), (_DOWN, (-1,)), (_STEPS, (2, 5, 10))))
    return _range(rng, rng.choice(templates), rng.choice(steps), least=9)


def _range(rng: random.Random, template: str, step: int, least: int = 3) -> Task:
    count = rng.randint(least, 15)
    low = rng.randint(0, 20) if rng.random() < 0.4 else rng.randint(0, 90)
    low = min(low, 120 - abs(step) * (count - 1))
    low = max(low, 0)
    numbers = [low + abs(step) * index for index in range(count)]
    if step < 0:
        numbers.reverse()
    question = template.format(a=numbers[0], b=numbers[-1], step=step)
    think = f"I start at {numbers[0]} and go {'down' if step < 0 else 'up'} by {abs(step)} until {numbers[-1]}."
    key = f"count {numbers[0]} {numbers[-1]} {step}"
    return Task(key, Exchange(question, think, ", ".join(str(number) for number in numbers)))


def counting_words(rng: random.Random) -> Task:
    """Return a task to count the words of a list of up to 20, longer than those of `counting`."""
    return _words_counted(rng, [any_word(rng) for _ in range(rng.randint(2, 20))])


def counting_one_word(rng: random.Random) -> Task:
    """Return a task to count one word in a list. Its reasoning numbers all words, since the words themselves repeat."""
    different = [any_word(rng) for _ in range(rng.randint(2, 4))]
    words = [rng.choice(different) for _ in range(rng.randint(3, 9))]
    word = different[0]
    question = rng.choice(_HOW_OFTEN).format(word=word, words=_spaced(rng, words))
    seen = itertools.count(1)
    steps = (f"{at} {each}{f': {next(seen)}' if each == word else ''}" for at, each in enumerate(words, start=1))
    think = f"I look for {word}. {', '.join(steps)}."
    return Task(text_key(question), Exchange(question, think, str(words.count(word))))


def _words_counted(rng: random.Random, words: list[str]) -> Task:
    question = rng.choice(_HOW_MANY).format(words=_spaced(rng, words))
    think = ", ".join(f"{word} {number}" for number, word in enumerate(words, start=1)) + "."
    return Task(text_key(question), Exchange(question, think, str(len(words))))


def _spaced(rng: random.Random, words: list[str]) -> str:
    return (", " if rng.random() < 0.5 else " ").join(words)
