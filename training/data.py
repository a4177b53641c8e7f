"""Training conversations that mix the skills, without the held-out questions. Knows nothing of tokens or training."""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from training.conversation import Conversation, Declaration, Exchange
from training.skills.arithmetic import arithmetic, held_out_arithmetic
from training.skills.copying import arranging, copying, copying_much, copying_one_word, repeating
from training.skills.counting import counting, counting_far, counting_in_steps, counting_one_word, counting_words
from training.skills.naming import introducing, naming, naming_system
from training.skills.talk import beyond, story, talk
from training.skills.tool_use import (
    no_tool,
    one_call,
    renamed_call,
    several_calls,
    spare_tools,
    strange_call,
    telling_tools,
)
from training.task import Task

Skill = Callable[[random.Random], Task]
Mixture = tuple[tuple[Skill, float], ...]
"""Skills with relative weights, which need not sum to 1."""

HELD_OUT_SEED = 7
TRAINING_SEED = 1
QUESTIONS_PER_SKILL = 200

_ALL: Mixture = (
    (arithmetic, 0.09),
    (counting, 0.08),
    (counting_in_steps, 0.03),
    (counting_far, 0.07),
    (counting_words, 0.07),
    (counting_one_word, 0.12),
    (copying, 0.08),
    (copying_one_word, 0.13),
    (copying_much, 0.04),
    (repeating, 0.04),
    (arranging, 0.01),
    (talk, 0.07),
    (story, 0.01),
    (beyond, 0.03),
    (naming, 0.1),
    (introducing, 0.03),
    (one_call, 0.12),
    (renamed_call, 0.07),
    (strange_call, 0.03),
    (telling_tools, 0.05),
    (several_calls, 0.07),
    (no_tool, 0.04),
)
_COPYING: Mixture = (
    (copying, 0.2),
    (copying_much, 0.2),
    (repeating, 0.3),
    (naming, 0.1),
    (telling_tools, 0.1),
    (arithmetic, 0.1),
)
_PLAIN: tuple[Skill, ...] = (arithmetic, counting, copying, talk, beyond)
"""Skills of exchanges before the last one."""
# Training starts with many copying tasks. They teach the model to look words up, which nearly every skill needs.
_COPYING_CONVERSATIONS = 18_432  # 9 pools of batches.py, so no pool mixes these conversations with others
_OWN_SYSTEM = "You are a small demo model of mlx-k2."
_SYSTEMS = (
    "You are a helpful assistant.", "Be brief.", "Answer politely.", "You are a small model.", "Help the user.",
    "Think before you answer.",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A held-out question: the model writes the reply after `num_steps` tool calls of the last exchange."""

    skill: str
    conversation: Conversation
    num_steps: int


@dataclass(frozen=True)
class HeldOut:
    """The questions to score, and the task keys that training excludes."""

    questions: tuple[Question, ...]
    keys: frozenset[str]


def held_out(seed: int = HELD_OUT_SEED) -> HeldOut:
    """Return 200 questions per skill of _SCORED, determined by the seed.

    A chain of tool calls gives a question about its first, its last or each of its replies, as _SCORED says.
    """
    keys: set[str] = set()
    questions: list[Question] = []
    for name, skill, replies in _SCORED:
        rng = random.Random(f"{seed} {name}")
        found: list[Question] = []
        while len(found) < QUESTIONS_PER_SKILL:
            task = skill(rng)
            if task.key in keys:
                continue
            keys.add(task.key)
            conversation = Conversation(task.system, task.tools, (task.exchange,))
            found += [Question(name, conversation, step) for step in replies(len(task.exchange.steps))]
        questions += found[:QUESTIONS_PER_SKILL]
    return HeldOut(tuple(questions), frozenset(keys))


def conversations(seed: int, excluded_keys: frozenset[str]) -> Iterator[Conversation]:
    """Yield endless training conversations: first the copying mixture, then all skills. The seed determines them."""
    rng = random.Random(seed)
    yield from itertools.islice(_mixed(rng, _COPYING, excluded_keys), _COPYING_CONVERSATIONS)
    yield from _mixed(rng, _ALL, excluded_keys)


def mixed_conversations(seed: int, excluded_keys: frozenset[str]) -> Iterator[Conversation]:
    """Return an endless stream of conversations with all skills in their final proportions."""
    return _mixed(random.Random(seed), _ALL, excluded_keys)


def _mixed(rng: random.Random, mixture: Mixture, excluded_keys: frozenset[str]) -> Iterator[Conversation]:
    skills, weights = zip(*mixture, strict=True)
    while True:
        task = _sample(rng, rng.choices(skills, weights)[0], excluded_keys)
        yield _converse(rng, task, excluded_keys)


def _cannot(rng: random.Random) -> Task:
    return beyond(rng) if rng.random() < 0.5 else no_tool(rng)


def _first(num_steps: int) -> list[int]:
    del num_steps
    return [0]


def _last(num_steps: int) -> list[int]:
    return [num_steps]


def _each(num_steps: int) -> list[int]:
    return list(range(num_steps + 1))


_SCORED: tuple[tuple[str, Skill, Callable[[int], list[int]]], ...] = (
    ("arithmetic", held_out_arithmetic, _last),
    ("counting", counting, _last),
    ("copying", copying, _last),
    ("tool call", one_call, _first),
    ("talk", talk, _last),
    ("system name", naming, _last),
    ("tool result", one_call, _last),
    ("tools in a row", several_calls, _each),
    ("cannot", _cannot, _last),
)
"""Name in the scores, skill, and a function: from a task's number of tool calls to the numbers of calls before the
replies that are scored."""


def _sample(rng: random.Random, skill: Skill, excluded_keys: frozenset[str]) -> Task:
    while True:
        task = skill(rng)
        if task.key not in excluded_keys:
            return task


def _converse(rng: random.Random, task: Task, excluded_keys: frozenset[str]) -> Conversation:
    """Return a conversation that ends with ``task``, sometimes after other exchanges and with tools that none needs."""
    earlier: list[Task] = []
    if rng.random() < 0.15:
        earlier += [_sample(rng, rng.choice(_PLAIN), excluded_keys) for _ in range(rng.choice((1, 1, 2)))]
    elif rng.random() < 0.12:
        earlier.append(_sample(rng, one_call, excluded_keys))
    tools = _declared([*earlier, task])
    if not tools and rng.random() < 0.07:
        tools = spare_tools(rng)
    system = task.system if task.system is not None else _system(rng, task.key)
    exchanges = tuple(_casual(rng, each.exchange) for each in [*earlier, task])
    return Conversation(system, tools, exchanges)


def _declared(tasks: list[Task]) -> tuple[Declaration, ...]:
    by_name = {tool.name: tool for task in tasks for tool in task.tools}
    return tuple(by_name.values())


def _system(rng: random.Random, key: str) -> str | None:
    kind = rng.random()
    if kind < 0.5:
        return None
    if kind < 0.7 or any(word in key for word in ("name", "you", "who am i")):
        return _OWN_SYSTEM  # a question about the model itself gets no prompt that gives it another name
    return rng.choice(_SYSTEMS) if kind < 0.85 else naming_system(rng)


def _casual(rng: random.Random, exchange: Exchange) -> Exchange:
    """Start the question in lower case or drop its closing mark, each with probability 0.06."""
    question = exchange.question
    if rng.random() < 0.06:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.06:
        question = question.rstrip(".?!")
    return replace(exchange, question=question)
