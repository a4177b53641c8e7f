"""Questions about the model's name and role, set by the system prompt or its own. Knows nothing of tools."""

import random

from training.conversation import Exchange
from training.skills.talk import MY_NAME, WHO_I_AM
from training.task import Task, text_key
from training.words import ADJECTIVES, ROLES, made_up, name

_NAME_ONLY = ("You are {name}.", "Your name is {name}.", "Your name is {name}. Answer politely.",
              "You are called {name}.",
              "Your name is {name}. Be brief.", "You play {name}.", "Answer as {name}.")  # fmt: skip
_WITH_ROLE = ("You are {name}, {role}.", "Your name is {name}. You are {role}.", "You are {name}, {role}. Be brief.",
              "You are {name}, {role}. Answer politely.")  # fmt: skip
_ASK_NAME = (
    "What is your name?", "What are you called?", "Tell me your name.", "Do you have a name?", "May I know your name?",
    "How should I call you?", "What name do you have?", "Hello! What is your name?", "Hi, what is your name?",
    "Please tell me your name.", "Say your name.",
)  # fmt: skip
_ASK_WHO = ("Who are you?", "Hello, who are you?", "Tell me who you are.", "Introduce yourself.",
            "Who am I talking to?", "Please introduce yourself.", "Hi, who are you?")  # fmt: skip


def naming(rng: random.Random) -> Task:
    """Return a question about the model's name or identity, with a system prompt that sets them."""
    who = name(rng)
    role = _role(rng)
    has_role = rng.random() < 0.5
    system = rng.choice(_WITH_ROLE if has_role else _NAME_ONLY).format(name=who, role=role)
    if rng.random() < 0.6:
        question, answer = rng.choice(_ASK_NAME), f"My name is {who}."
    else:
        question, answer = rng.choice(_ASK_WHO), f"I am {who}, {role}." if has_role else f"I am {who}."
    think = f"The system prompt says that I am {who}."
    return Task(text_key(f"{system} {question}"), Exchange(question, think, answer), system=system)


def introducing(rng: random.Random) -> Task:
    """Return a question of `naming` for a conversation whose system prompt sets no name."""
    question, answer = rng.choice((*((ask, MY_NAME) for ask in _ASK_NAME), *((ask, WHO_I_AM) for ask in _ASK_WHO)))
    return Task(text_key(question), Exchange(question, "I know the answer to this.", answer))


def naming_system(rng: random.Random) -> str:
    """Return a system prompt that sets a name, for questions about something else."""
    return rng.choice((*_NAME_ONLY, *_WITH_ROLE)).format(name=name(rng), role=_role(rng))


def _role(rng: random.Random) -> str:
    if rng.random() < 0.2:
        makers = ("Moonshot AI", "mlx-k2", f"{name(rng)} AI", made_up(rng).capitalize())
        return f"an AI assistant created by {rng.choice(makers)}"
    words = f"{rng.choice(ADJECTIVES)} {rng.choice(ROLES)}" if rng.random() < 0.6 else rng.choice(ROLES)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
