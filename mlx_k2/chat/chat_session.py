"""A running conversation: messages of the user in, events out. Knows neither stages nor a terminal."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from mlx_k2.chat.chat_events import Event, MessageAdded
from mlx_k2.chat.conversation import Conversation
from mlx_k2.chat.next_prompt import NextPromptPrefill, ReplySource
from mlx_k2.chat.tool_round import Approval, Tools, run_calls
from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.handle import Finished, Handle, Progress, Token
from mlx_k2.coordinator.reply_policy import NO_LIMITS, ReplyLimits, ReplyPolicy
from mlx_k2.errors import ClusterError, RequestError, RequestFailed, SetupError
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import FinishReason, Request, check_request
from mlx_k2.text.reply_grammar import ReplyGrammar
from mlx_k2.text.reply_parts import Content, Part, Reasoning, Reply, whole_reply
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.text.tool_call import ToolCall

MAX_TOOL_CALLS = 300
"""The default limit. Kimi K2 Thinking is made for 200 to 300 calls in a row."""
_NUM_SEEDS = 2**63  # Sampling allows seeds from 0 to 2^63 - 1


@dataclass(frozen=True)
class ReplySettings:
    """The settings of replies. ``max_tokens`` is per reply, ``max_tool_calls`` per message of the user."""

    sampling: Sampling
    max_tokens: int
    stop_ids: frozenset[int]
    context_tokens: int
    timeout_s: float | None = None
    """The time limit of each reply, counted from the start of its prefill."""
    limits: ReplyLimits = NO_LIMITS
    grammar: ReplyGrammar | None = None
    """The constraint of each reply; None allows every token."""
    max_tool_calls: int = MAX_TOOL_CALLS

    @property
    def warnings(self) -> tuple[str, ...]:
        """Lines for the user about keywords of schemas that cannot be enforced."""
        return () if self.grammar is None else self.grammar.warnings

    def request(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> Request:
        """Return the request for a reply to a prompt.

        Raises:
            RequestError: the prompt is empty, has an invalid token id, or does not fit into the context.
        """
        request = Request(tuple(prompt_ids), self.max_tokens, self.sampling, self.stop_ids, self.timeout_s)
        check_request(request, tokenizer.vocab_size, self.context_tokens)
        return request

    def policy(
        self, tokenizer: Tokenizer, request: Request, *, is_after_calls: bool = False, is_raw: bool = False
    ) -> ReplyPolicy:
        """Return the token policy for the reply to a request.

        ``is_after_calls``: the prompt ends with results of tools. ``is_raw``: the prompt has no chat template, so that
        the answer is one text without reasoning and calls.
        """
        grammar = self.grammar
        if grammar is not None and is_after_calls:
            grammar = grammar.after_calls()
        return ReplyPolicy(tokenizer, request, self.limits, grammar, is_raw=is_raw)


@dataclass
class _SampledReply:
    """A reply during sampling: its tokens and parts so far, and its finish reason; until it has ended CANCELLED."""

    token_ids: list[int]
    parts: list[Part]
    finish_reason: FinishReason = FinishReason.CANCELLED


def reply_events(handle: Handle) -> Iterator[Progress | Token | Part | AnswerSummary]:
    """Yield the events of a reply, each token before the parts that it completes, and its summary last."""
    for event in handle.events():
        if isinstance(event, Finished):
            yield from event.parts
            yield event.summary
        else:
            yield event
            if isinstance(event, Token):
                yield from event.parts


class ChatSession:
    """One conversation with one model, which may call ``tools`` with the approval of ``approve``.

    ``send_message`` and ``retry`` are generators: iterating them runs the answer. A message is part of the conversation
    when its ``MessageAdded`` is yielded. ``stop`` may be called from any thread, all other methods from one thread.
    """

    def __init__(
        self,
        source: ReplySource,
        tokenizer: Tokenizer,
        conversation: Conversation,
        settings: ReplySettings,
        tools: Tools | None = None,
        approve: Approval = lambda _call: False,
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self.conversation = conversation
        """The conversation, for reading only."""
        self._settings = settings
        self._tools = tools
        self._approve = approve
        self._is_stopped = False
        self._handle: Handle | None = None
        self._prefill: NextPromptPrefill | None = None

    def send_message(self, text: str) -> Generator[Event, None, None]:
        """Add ``text`` as the user's message and yield the events of the model's answer.

        Raises:
            RequestError, TokenizerError: the conversation is too long for the context, or the template refuses it.
                Before the first reply the message is removed again; after tool calls their results stay.
            RequestFailed, ClusterError: a stage failed; the answer text so far is part of the conversation.
        """
        self._is_stopped = False
        conversation = self.cancel_prefill()
        message = conversation.add_user(text)
        try:
            request = self._request()
        except SetupError:
            conversation.undo()
            raise
        yield MessageAdded(message)
        yield from self._answer(request)

    def retry(self) -> Generator[Event, None, None]:
        """Answer the user's last message again, with the next seed.

        Raises:
            RequestError: the user has sent no message, or as ``send_message``.
            TokenizerError, RequestFailed, ClusterError: as ``send_message``.
        """
        self._is_stopped = False
        if not self.cancel_prefill().remove_reply():
            raise RequestError("there is nothing to answer yet")
        sampling = self._settings.sampling
        seed = (sampling.seed + 1) % _NUM_SEEDS
        self._settings = replace(self._settings, sampling=msgspec.structs.replace(sampling, seed=seed))
        yield from self._answer(self._request())

    def stop(self) -> None:
        """End the current answer. Safe in a signal handler and from any thread; does not wait."""
        self._is_stopped = True
        handle = self._handle  # the answering thread may replace it by None meanwhile
        if handle is not None:
            handle.cancel()

    def set_thinking(self, *, thinking: bool, temperature: float) -> None:
        """Select whether the next replies begin with thinking, and their temperature.

        Raises:
            RequestError: the model's chat template has no such mode; nothing is changed.
        """
        self.cancel_prefill().set_thinking(thinking)
        sampling = msgspec.structs.replace(self._settings.sampling, temperature=temperature)
        self._settings = replace(self._settings, sampling=sampling)

    def load(self, messages: Sequence[Mapping[str, object]]) -> tuple[str, ...]:
        """Replace the conversation by these messages; return a line for each message of which a field was left out.

        Raises:
            RequestError, TokenizerError: the messages cannot be used; the conversation is unchanged.
        """
        return self.cancel_prefill().load(messages, self._settings.context_tokens)

    def cancel_prefill(self) -> Conversation:
        """End the prefill of the next prompt and return the conversation, which may then be changed."""
        if self._prefill is not None:
            self._prefill.cancel()
            self._prefill = None
        return self.conversation

    def prefill_next_prompt(self) -> None:
        """Start to prefill the known part of the next prompt, in the background until the next request."""
        self.cancel_prefill()
        limit = self._settings.context_tokens - 1  # a request needs a position for the first token of its reply
        self._prefill = NextPromptPrefill(self._source, lambda: self.conversation.next_prompt_prefix()[:limit])

    def _request(self) -> Request:
        return self._settings.request(self._tokenizer, self.conversation.prompt_ids())

    def _answer(self, request: Request) -> Generator[Event, None, None]:
        """Yield the events of replies and rounds of tool calls, until a reply calls no tool or the user stops it."""
        calls_left = self._settings.max_tool_calls
        may_call = self._tools is not None
        is_after_calls = False
        while True:
            sampled_reply = yield from self._sample(request, is_after_calls=is_after_calls)
            if sampled_reply.finish_reason in (FinishReason.CANCELLED, FinishReason.TIMEOUT):
                yield from self._keep_content(sampled_reply)
                return
            reply = whole_reply(sampled_reply.parts)
            if not may_call or _ends_inside_call(sampled_reply.finish_reason, reply):
                reply = replace(reply, calls=())
            yield MessageAdded(self.conversation.add_reply(reply, sampled_reply.token_ids))
            if self._tools is None or not reply.calls:
                return
            texts = yield from run_calls(reply.calls, self._tools, self._approve, lambda: self._is_stopped, calls_left)
            for message in self.conversation.add_results(texts):
                yield MessageAdded(message)
            is_after_calls = True
            may_call = len(reply.calls) <= calls_left  # else a result has asked the model to answer without tools
            calls_left = max(0, calls_left - len(reply.calls))
            if self._is_stopped:
                return
            request = self._request()

    def _sample(self, request: Request, *, is_after_calls: bool) -> Generator[Event, None, _SampledReply]:
        """Yield the events of one reply and return the reply. After a fault, keep its text so far."""
        sampled_reply = _SampledReply([], [])
        policy = self._settings.policy(self._tokenizer, request, is_after_calls=is_after_calls)
        handle = self._handle = self._source.submit(request, policy)
        try:
            if self._is_stopped:  # ``stop`` was called before it could see the handle
                handle.cancel()
            for event in reply_events(handle):
                match event:
                    case Token(token_id):
                        sampled_reply.token_ids.append(token_id)
                    case Reasoning() | Content() | ToolCall():
                        sampled_reply.parts.append(event)
                    case AnswerSummary(finish_reason=reason):
                        sampled_reply.finish_reason = reason
                yield event
        except (ClusterError, RequestFailed):
            yield from self._keep_content(sampled_reply)
            raise
        finally:
            self._handle = None
            handle.cancel()  # the caller may have closed this generator
        return sampled_reply

    def _keep_content(self, sampled_reply: _SampledReply) -> Generator[Event, None, None]:
        """Add the answer text of an incomplete reply to the conversation; drop a reply without answer text."""
        reply = replace(whole_reply(sampled_reply.parts), calls=())
        if reply.content.strip():
            yield MessageAdded(self.conversation.add_reply(reply, sampled_reply.token_ids))


def _ends_inside_call(reason: FinishReason, reply: Reply) -> bool:
    """Return whether the token limit cut off the last tool call of a reply."""
    return reason is FinishReason.LENGTH and bool(reply.calls) and reply.calls[-1].error is not None
