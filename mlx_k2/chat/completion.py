"""Requests for replies to a prompt, and the complete reply as programs and files get it. Knows no terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from mlx_k2.chat.chat_session import ReplySettings
from mlx_k2.chat.sampling_options import SamplingOptions
from mlx_k2.coordinator.answer_summary import AnswerSummary, Usage
from mlx_k2.coordinator.handle import Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.sampling import sampling_per_answer
from mlx_k2.text.message import CalledFunction, Message, MessageCall, assistant_message
from mlx_k2.text.prompt import encode_pieces, render_pieces
from mlx_k2.text.reply_parts import Reply
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.weights.model_frontend import ModelFrontend


class RequestedCall(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A call that the model wrote and nothing has run. ``arguments`` is the exact text that the model wrote."""

    id: str
    name: str
    arguments: str
    error: str | None = None
    """The reason why the call cannot be run, as text for the model; None if it can."""


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A complete reply. In JSON ``content`` is the field ``text``."""

    content: str = msgspec.field(name="text")
    reasoning: str
    tool_calls: tuple[RequestedCall, ...]
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


def encode_prompt(
    frontend: ModelFrontend,
    messages: Sequence[Message],
    options: SamplingOptions,
    tools: Sequence[Mapping[str, object]] = (),
) -> list[int]:
    """Return the token ids of the prompt for a reply to ``messages``. ``tools`` are declarations in OpenAI's format.

    Raises:
        RequestError, TokenizerError: the template refuses the messages or the mode of thinking, or fails.
    """
    template = frontend.template
    variables = options.mode.variables(template)
    return encode_pieces(frontend.tokenizer, render_pieces(template, frontend.tokenizer, messages, tools, **variables))


def submissions_for(
    settings: ReplySettings,
    frontend: ModelFrontend,
    prompt_ids: Sequence[int],
    num_answers: int = 1,
    *,
    is_raw: bool = False,
) -> list[Submission]:
    """Return ``num_answers`` submissions for one prompt, each with its own seed; the first has the settings' seed.

    Submissions that are made together compute the prompt once. With ``is_raw`` the prompt has no chat template.

    Raises:
        RequestError: the prompt is empty, has an invalid token id, or does not fit into the context.
    """
    tokenizer = frontend.tokenizer
    requests = [
        replace(settings, sampling=sampling).request(tokenizer, prompt_ids)
        for sampling in sampling_per_answer(settings.sampling, num_answers)
    ]
    return [Submission(request, settings.policy(tokenizer, request, is_raw=is_raw)) for request in requests]


class LikelyToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token and its log-probability. If ``bytes`` are part of a character, ``text`` has U+FFFD in its place."""

    token: int
    text: str
    bytes: tuple[int, ...]
    logprob: float | None
    """None for a forced token, which was the only one allowed."""


class SampledLogprob(LikelyToken, frozen=True, kw_only=True):
    """A token of a reply, and the most likely tokens at its position."""

    top: tuple[LikelyToken, ...]


def sampled_logprob(tokenizer: Tokenizer, token: Token) -> SampledLogprob:
    """Return a token of a reply with the log-probabilities at its position."""

    def fields(token_id: int, logprob: float | None) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": token_id, "text": data.decode(errors="replace"), "bytes": tuple(data), "logprob": logprob}

    top = tuple(LikelyToken(**fields(token_id, logprob)) for token_id, logprob in token.top)
    return SampledLogprob(**fields(token.token_id, token.logprob), top=top)


def completion_of(reply: Reply, summary: AnswerSummary, num_calls_before: int = 0) -> Completion:
    """Return a reply with the finish reason, seed and usage of its summary.

    The ids of its calls are numbered from ``num_calls_before``, the number of earlier calls.
    """
    message_calls = assistant_message(reply, num_calls_before).tool_calls
    return Completion(
        content=reply.content,
        reasoning=reply.reasoning,
        tool_calls=tuple(
            RequestedCall(id=message_call.id, name=call.name, arguments=call.arguments, error=call.error)
            for call, message_call in zip(reply.calls, message_calls, strict=True)
        ),
        finish_reason=summary.finish_reason.value,
        seed=summary.seed,
        usage=summary.usage,
    )
