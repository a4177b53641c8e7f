"""One reply to a prompt: the request for it, and the complete reply as programs and files get it. Knows no terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from mlx_k2.chat.chat_session import ReplySettings
from mlx_k2.chat.sampling_options import SamplingOptions
from mlx_k2.coordinator.answer_summary import AnswerSummary, Usage
from mlx_k2.coordinator.handle import Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.sampling import for_answers
from mlx_k2.text.message import CalledFunction, Message, MessageCall, assistant_message
from mlx_k2.text.prompt import encode_pieces, render_pieces
from mlx_k2.text.reply_parts import Reply
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.weights.model_frontend import ModelFrontend


class CalledTool(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A tool call of the model. ``arguments`` is the exact text that it wrote; nothing has run it."""

    id: str
    name: str
    arguments: str
    error: str | None = None
    """Why the call cannot be run, as text for the model; None if it can."""


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A complete reply. In JSON ``content`` is the field ``text``."""

    content: str = msgspec.field(name="text")
    reasoning: str
    tool_calls: tuple[CalledTool, ...]
    finish_reason: str
    """``stop``, ``length`` (max_tokens, or the context is full), ``timeout`` or ``cancelled``."""
    seed: int
    usage: Usage

    @property
    def message(self) -> dict[str, Any]:
        """The reply as a message in OpenAI's format, to continue the conversation with."""
        calls = tuple(
            MessageCall(id=call.id, function=CalledFunction(call.name, call.arguments)) for call in self.tool_calls
        )
        message = Message(role="assistant", content=self.content, reasoning_content=self.reasoning, tool_calls=calls)
        return message.json_value()


def prompt_of(
    frontend: ModelFrontend,
    messages: Sequence[Message],
    options: SamplingOptions,
    tools: Sequence[Mapping[str, object]] = (),
) -> list[int]:
    """Return the prompt of a reply to ``messages``. ``tools`` are declarations.

    Raises:
        RequestError, TokenizerError: it cannot be made; gives the reason.
    """
    template = frontend.template
    variables = options.mode.variables(template)
    return encode_pieces(frontend.tokenizer, render_pieces(template, frontend.tokenizer, messages, tools, **variables))


def submissions(
    settings: ReplySettings,
    frontend: ModelFrontend,
    prompt_ids: Sequence[int],
    num_answers: int = 1,
    *,
    is_raw: bool = False,
) -> list[Submission]:
    """Return the requests for several replies to one prompt, each with its own seed.

    The first one has the seed of the settings. Requests that are submitted together compute the prompt
    once. ``is_raw``: the prompt is continued as a text.

    Raises:
        RequestError: they can never run.
    """
    tokenizer, samplings = frontend.tokenizer, for_answers(settings.sampling, num_answers)
    requests = [replace(settings, sampling=one).request(tokenizer, prompt_ids) for one in samplings]
    return [Submission(request, settings.policy(tokenizer, request, is_raw=is_raw)) for request in requests]


class LikelyToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token and its log-probability. ``bytes`` may be part of a character; ``text`` has U+FFFD for it."""

    token: int
    text: str
    bytes: tuple[int, ...]
    logprob: float | None
    """None for a token that was not sampled, because there was no alternative."""


class SampledLogprob(LikelyToken, frozen=True, kw_only=True):
    """A token of a reply, and the most likely tokens at its position."""

    top: tuple[LikelyToken, ...]


def sampled_logprob(tokenizer: Tokenizer, token: Token) -> SampledLogprob:
    """Return the log-probabilities of a token of a reply."""

    def fields(token_id: int, logprob: float | None) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": token_id, "text": data.decode(errors="replace"), "bytes": tuple(data), "logprob": logprob}

    top = tuple(LikelyToken(**fields(token_id, logprob)) for token_id, logprob in token.top)
    return SampledLogprob(**fields(token.token_id, token.logprob), top=top)


def completion_of(reply: Reply, summary: AnswerSummary, num_calls_before: int = 0) -> Completion:
    """Return a reply with its counts. Its calls are numbered from ``num_calls_before``, those of the conversation."""
    written = assistant_message(reply, num_calls_before).tool_calls
    return Completion(
        content=reply.content,
        reasoning=reply.reasoning,
        tool_calls=tuple(
            CalledTool(id=numbered.id, name=call.name, arguments=call.arguments, error=call.error)
            for call, numbered in zip(reply.calls, written, strict=True)
        ),
        finish_reason=summary.finish_reason.value,
        seed=summary.seed,
        usage=summary.usage,
    )
