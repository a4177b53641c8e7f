"""Sums, differences and products of small numbers, worked out digit by digit. Knows nothing of other skills."""

import random

from training.conversation import Exchange
from training.task import Task
from training.words import name, noun

_PLUS = (
    "What is {a} plus {b}?", "What is {a} + {b}?", "{a} + {b}", "{a} + {b} = ?", "{a} plus {b}", "Add {a} and {b}.",
    "How much is {a} plus {b}?", "How much is {a} + {b}?", "What is the sum of {a} and {b}?", "Please add {b} to {a}.",
    "Calculate {a} + {b}.", "Can you add {a} and {b}?", "What do {a} and {b} make?", "Work out {a} plus {b}.",
    "Tell me {a} + {b}.", "{who} has {a} {thing}s and gets {b} more. How many {thing}s does {who} have?",
    "There are {a} {thing}s here and {b} {thing}s there. How many are there in all?",
)  # fmt: skip
_MINUS = (
    "What is {a} minus {b}?", "What is {a} - {b}?", "{a} - {b}", "{a} - {b} = ?", "{a} minus {b}",
    "Subtract {b} from {a}.", "How much is {a} minus {b}?", "How much is {a} - {b}?", "Take {b} away from {a}.",
    "Calculate {a} - {b}.", "Can you subtract {b} from {a}?", "Work out {a} minus {b}.", "Tell me {a} - {b}.",
    "What is {a} less {b}?",
)  # fmt: skip
_MINUS_STORIES = (
    "{who} has {a} {thing}s and gives {b} away. How many {thing}s are left?",
    "There are {a} {thing}s and {b} of them break. How many are left?",
)
_TIMES = (
    "What is {a} times {b}?", "What is {a} * {b}?", "{a} * {b}", "{a} * {b} = ?", "{a} times {b}",
    "Multiply {a} by {b}.", "How much is {a} times {b}?", "Calculate {a} * {b}.", "Work out {a} times {b}.",
    "Can you multiply {a} and {b}?", "What is the product of {a} and {b}?", "Tell me {a} * {b}.",
    "{who} has {a} boxes with {b} {thing}s each. How many {thing}s is that?",
)  # fmt: skip


def arithmetic(rng: random.Random) -> Task:
    """Return a task with a sum, a difference or a product of numbers up to 99."""
    kind = rng.random()
    if kind < 0.45:
        return addition(rng)
    return subtraction(rng) if kind < 0.85 else multiplication(rng)


def held_out_arithmetic(rng: random.Random) -> Task:
    """Return arithmetic for held-out questions: with a two-digit number, since training needs every one-digit task."""
    while True:
        task = arithmetic(rng)
        if any(len(number) > 1 for number in task.key.split()[::2]):  # the key is, for instance, "3 + 14"
            return task


def addition(rng: random.Random) -> Task:
    """Return a task with the sum of two numbers up to 99."""
    a, b = _number(rng), _number(rng)
    return _task(rng, rng.choice(_PLUS), "+", a, b, f"{_addition_steps(a, b)} {a + b}.", a + b)


def subtraction(rng: random.Random) -> Task:
    """Return a task with the difference of two numbers up to 99, which is sometimes negative."""
    a, b = _number(rng), _number(rng)
    if a < b and rng.random() < 0.7:
        a, b = b, a
    template = rng.choice(_MINUS + _MINUS_STORIES if a >= b else _MINUS)
    if a >= b:
        return _task(rng, template, "-", a, b, f"{_subtraction_steps(a, b)} {a - b}.", a - b)
    think = f"{a} is less than {b}: {b} - {a} and a minus sign. {_subtraction_steps(b, a)} {b - a}. -{b - a}."
    return _task(rng, template, "-", a, b, think, a - b)


def multiplication(rng: random.Random) -> Task:
    """Return a task with a product up to 99. One factor has a single digit."""
    a = rng.randint(2, 9)
    b = rng.randint(2, 99 // a) if rng.random() < 0.8 else rng.randint(0, 10)
    if b < 10:
        think = f"{a} * {b} = {a * b}."
    else:
        tens, ones = b - b % 10, b % 10
        think = f"{a} * {tens} = {a * tens}, {a} * {ones} = {a * ones}. {_addition_steps(a * tens, a * ones)} {a * b}."
    if rng.random() < 0.5:
        return _task(rng, rng.choice(_TIMES), "*", a, b, think, a * b)
    return _task(rng, rng.choice(_TIMES), "*", b, a, think, a * b)


def _number(rng: random.Random) -> int:
    return rng.randrange(100) if rng.random() < 0.85 else rng.randrange(10)


def _task(rng: random.Random, template: str, sign: str, a: int, b: int, think: str, value: int) -> Task:
    question = template.format(a=a, b=b, who=name(rng), thing=noun(rng))
    return Task(
        key=f"{a} {sign} {b}",
        exchange=Exchange(question, f"{a} {sign} {b}. {think}", f"{a} {sign} {b} = {value}"),
    )


def _addition_steps(a: int, b: int) -> str:
    ones = a % 10 + b % 10
    carry = ones >= 10
    text = f"Ones: {a % 10} + {b % 10} = {ones}"
    text += f", write {ones - 10}, carry 1." if carry else "."
    if a < 10 and b < 10:
        return text
    tens = a // 10 + b // 10 + carry
    return f"{text} Tens: {a // 10} + {b // 10}{' + 1' if carry else ''} = {tens}."


def _subtraction_steps(a: int, b: int) -> str:
    ones = a % 10 - b % 10
    borrow = ones < 0
    text = f"Ones: {a % 10} - {b % 10}"
    text += f", borrow 1, {a % 10 + 10} - {b % 10} = {ones + 10}." if borrow else f" = {ones}."
    if a < 10 and b < 10:
        return text
    tens = a // 10 - b // 10 - borrow
    return f"{text} Tens: {a // 10} - {b // 10}{' - 1' if borrow else ''} = {tens}."
