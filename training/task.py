"""One question to the model and its right reply. Knows nothing of how often each skill occurs."""

from dataclasses import dataclass

from training.conversation import Declaration, Exchange


@dataclass(frozen=True)
class Task:
    """A question with its right reply.

    `key` identifies the question in every spelling and context: a held-out key never occurs in training.
    `system` None means a random system prompt. `tools` are the tools that must be declared.
    """

    key: str
    exchange: Exchange
    system: str | None = None
    tools: tuple[Declaration, ...] = ()


def text_key(text: str) -> str:
    """Return a key that ignores case, spacing and closing punctuation."""
    return " ".join(text.lower().split()).rstrip(" .?!")
