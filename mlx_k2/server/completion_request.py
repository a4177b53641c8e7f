"""The bodies of text completions, and of /tokenize and /detokenize. Knows no model."""

from typing import Any

import msgspec

from mlx_k2.server.api_errors import bad_request_error
from mlx_k2.server.request_fields import GenerationFields, check_field, check_fields, read_fields


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """The fields of ``POST /v1/completions`` that are read. ``prompt`` is one text, or the token ids of one."""

    prompt: str | list[Any]
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None
    return_token_ids: bool | None = None
    """Whether each choice has the ids of its tokens, the one that ends the text included."""

    @property
    def text_or_ids(self) -> str | list[int]:
        """The prompt as one text, or as token ids.

        Raises:
            ApiError: 400, it is neither one text nor the token ids of one.
        """
        prompt = self.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if isinstance(prompt, str) or all(type(number) is int for number in prompt):
            return prompt
        raise bad_request_error("prompt: give one text, or the token ids of one", "prompt")


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of ``POST /tokenize``: a text, under either of its two names, or those of a chat request."""

    prompt: str | None = None
    content: str | None = None
    messages: Any = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of ``POST /detokenize``."""

    tokens: list[int]


def read_completion_request(body: bytes) -> CompletionRequest:
    """Return a checked request for a text completion.

    Raises:
        ApiError: 400; names the field that is malformed, or asks for something that this server does not do.
    """
    completion = read_fields(body, CompletionRequest)
    check_fields(completion)
    for name in ("suffix", "echo", "logprobs", "response_format"):
        check_field(not getattr(completion, name), name, f"{name} is not supported: leave it out")
    best_of = completion.best_of
    check_field(best_of in (None, completion.n or 1), "best_of", "this server returns every choice: leave best_of out")
    return completion
