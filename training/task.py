"""One thing to ask the model and what it should do. Knows nothing of how often each kind occurs."""

from dataclasses import dataclass

from training.conversation import Declaration, Exchange


@dataclass(frozen=True)
class Task:
    """A question with its right reply.

    `key` identifies the question however it is spelled or embedded: a held-out key never occurs in training.
    `system` None leaves the system prompt to chance; `tools` are those that must be declared.
    """

    key: str
    exchange: Exchange
    system: str | None = None
    tools: tuple[Declaration, ...] = ()


def text_key(text: str) -> str:
    """A key that ignores case, spacing and closing punctuation."""
    return " ".join(text.lower().split()).rstrip(" .?!")
