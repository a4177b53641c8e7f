"""What was asked, and how it can end. Knows no text."""

import enum
from dataclasses import dataclass

from mlx_k2.errors import RequestError
from mlx_k2.sampling import Sampling


class FinishReason(enum.Enum):
    """Why a sequence got no further token."""

    STOP = "stop"
    """The model drew a stop token."""
    LENGTH = "length"
    """max_tokens were generated, or the context is full."""
    TIMEOUT = "timeout"
    """It ran for longer than it may."""
    CANCELLED = "cancelled"
    """Whoever asked no longer wants it."""


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and how to go on from it."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    timeout_s: float | None = None
    """How long it may run, from when its prompt begins; it then ends with the tokens that it has."""


def check_request(request: Request, vocab_size: int, context_tokens: int) -> None:
    """Refuse what can never run.

    Raises:
        RequestError: an empty or too long prompt, a token id outside the vocabulary, no token to generate.
    """
    length = len(request.prompt_ids)
    if length == 0:
        raise RequestError("the prompt is empty: give some text, or token ids")
    for token_id in request.prompt_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"token id {token_id} is outside the vocabulary of {vocab_size}")
    if length >= context_tokens:
        raise RequestError(
            f"the prompt has {length} tokens and the context holds {context_tokens}, "
            "so there is no room for an answer: shorten it, or give a larger --context"
        )
    if request.timeout_s is not None and not request.timeout_s > 0:  # false for nan, too
        raise RequestError(f"timeout is {request.timeout_s:g} s: give more than 0")
    if request.max_tokens < 1:
        raise RequestError(f"max-tokens is {request.max_tokens}: give at least 1")
