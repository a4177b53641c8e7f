"""Request: a prompt, its parameters and its priority; and the reasons why it ends. Knows token ids, but no text."""

import enum
from dataclasses import dataclass

import msgspec

from mlx_k2.errors import RequestError
from mlx_k2.sampling import Sampling

_sampling_decoder = msgspec.msgpack.Decoder(Sampling)


class FinishReason(enum.Enum):
    """Reason why a sequence ended."""

    STOP = "stop"
    """The answer is complete: its last token is a stop token, or the token policy ended it."""
    LENGTH = "length"
    """max_tokens were generated, or the context is full."""
    TIMEOUT = "timeout"
    """The request's ``timeout_s`` has passed."""
    CANCELLED = "cancelled"
    """The caller cancelled the request."""
    ERROR = "error"
    """The request failed; other requests continue."""


class Priority(enum.Enum):
    """Priorities of requests, in the order in which waiting requests start.

    A brief request starts when no interactive one waits. A background request runs only while no interactive one waits
    and no interactive or brief one runs. Both use the free slot in which the fewest cached tokens are lost.
    """

    INTERACTIVE = "interactive"
    BRIEF = "brief"
    BACKGROUND = "background"


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and the parameters for generating after it."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    timeout_s: float | None = None
    """Time limit, counted from the prompt's first step. At the limit the answer ends with its tokens so far."""
    priority: Priority = Priority.INTERACTIVE


def check_request(request: Request, vocab_size: int, context_tokens: int) -> None:
    """Reject a request that can never run.

    Raises:
        RequestError: a sampling parameter has the wrong type, the prompt is empty or too long, a token id of the prompt
            or of a logit bias is outside the vocabulary, or ``max_tokens`` or ``timeout_s`` is not above 0.
    """
    try:  # encode and decode the parameters, as for a stage: only the decoder checks types
        _sampling_decoder.decode(msgspec.msgpack.encode(request.sampling))
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"a sampling parameter has the wrong type: {error}") from None
    length = len(request.prompt_ids)
    if length == 0:
        raise RequestError("the prompt is empty: give some text, or token ids")
    for token_id in request.prompt_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"token id {token_id} is outside the vocabulary of {vocab_size}")
    for token_id, _ in request.sampling.logit_bias:
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"a logit bias is for token id {token_id}, outside the vocabulary of {vocab_size}")
    if length >= context_tokens:
        raise RequestError(
            f"the prompt has {length} tokens and the context holds {context_tokens}, "
            "so there is no room for an answer: shorten it, or give a larger --context, up to that of the model"
        )
    if request.timeout_s is not None and not request.timeout_s > 0:  # also rejects NaN
        raise RequestError(f"timeout is {request.timeout_s:g} s: give more than 0")
    if request.max_tokens < 1:
        raise RequestError(f"max-tokens is {request.max_tokens}: give at least 1")
