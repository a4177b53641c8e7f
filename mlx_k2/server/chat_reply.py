"""The reply to one request, and its deltas as the engine's events arrive. Knows no format of an API and no HTTP.

Streams are made from the deltas, and bodies from the reply or from the same deltas, so that the two always agree.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.handle import Event, Finished, Token
from mlx_k2.scheduling.request import FinishReason
from mlx_k2.server.language_model import Generation
from mlx_k2.server.turn_store import new_turn_handle
from mlx_k2.text.message import CalledFunction, Message, MessageCall
from mlx_k2.text.reply_parts import ArgumentsText, Content, Part, Reasoning, ToolCallHeader
from mlx_k2.text.tool_call import UNKNOWN, ToolCall, call_id


@dataclass(frozen=True)
class CallStartDelta:
    """The start of tool call number ``index``, counted from 0 in the reply."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArgumentsDelta:
    """A further part of the arguments of tool call ``index``, as JSON text."""

    index: int
    text: str


Delta: TypeAlias = Reasoning | Content | CallStartDelta | CallArgumentsDelta
"""What an event adds to a reply."""


@dataclass
class PartialCall:
    """A tool call, as far as it was received."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class ChatReply:
    """The reply to one request, as far as it was received."""

    generation: Generation
    on_end: "Callable[[ChatReply], None]" = lambda _: None
    """Called with the reply when it ends with STOP or LENGTH."""
    turn_handle: str = field(default_factory=new_turn_handle)
    """The handle of this reply in the turn store."""
    reasoning: str = ""
    content: str = ""
    calls: list[PartialCall] = field(default_factory=list)
    content_tokens: list[Token] = field(default_factory=list)
    """The content's tokens that have log-probabilities."""
    num_reasoning_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    summary: AnswerSummary | None = None
    """None until the reply is complete."""

    def __post_init__(self) -> None:
        self._last_part: type[Part] = Reasoning if self.generation.in_reasoning else Content
        self._tokens_without_text: list[Token] = []
        self._is_call_open = False
        self._num_returned = 0

    def add(self, event: Event) -> list[Delta]:
        """Add an event to the reply; return what it adds as deltas."""
        match event:
            case Token():
                self.token_ids.append(event.token_id)
                self._count(event)
                return self._add_parts(event.parts)
            case Finished():
                if any(isinstance(part, Content) for part in event.parts):
                    self.content_tokens += self._tokens_without_text
                deltas = self._add_parts(event.parts)
                self.summary = event.summary
                if event.reason in (FinishReason.STOP, FinishReason.LENGTH):
                    self.on_end(self)
                return deltas
        return []

    @property
    def message(self) -> Message:
        """The reply as a message."""
        calls = tuple(
            MessageCall(id=call.id, function=CalledFunction(call.name, call.arguments)) for call in self.calls
        )
        reasoning = self.reasoning or None
        return Message(role="assistant", content=self.content, reasoning_content=reasoning, tool_calls=calls)

    @property
    def finish_reason(self) -> str:
        """The end in OpenAI's words: "length" after a limit or inside a call, else "tool_calls" or "stop"."""
        reason = None if self.summary is None else self.summary.finish_reason
        if self._is_call_open or reason in (FinishReason.LENGTH, FinishReason.TIMEOUT):
            return "length"
        return "tool_calls" if self.calls else "stop"

    def next_content_tokens(self) -> list[Token]:
        """Return the tokens that were added to ``content_tokens`` since the previous call of this function."""
        tokens = self.content_tokens[self._num_returned :]
        self._num_returned += len(tokens)
        return tokens

    def _count(self, token: Token) -> None:
        """Count a token as reasoning or not, and keep its log-probability if it belongs to the content.

        A token that completes no text counts like the token before it; it belongs to the content if the next text does.
        """
        if token.parts:
            self._last_part = type(token.parts[-1])
        if self._last_part is Reasoning:
            self.num_reasoning_tokens += 1
        if token.logprob is None or self.generation.tokenizer.is_special(token.token_id):
            return
        if not token.parts:
            self._tokens_without_text.append(token)
            return
        if any(isinstance(part, Content) for part in token.parts):
            self.content_tokens += [*self._tokens_without_text, token]
        self._tokens_without_text.clear()

    def _add_parts(self, parts: Iterable[Part]) -> list[Delta]:
        deltas: list[Delta] = []
        for part in parts:
            match part:
                case Reasoning(text):
                    self.reasoning += text
                    deltas.append(part)
                case Content(text):
                    self.content += text
                    deltas.append(part)
                case ToolCallHeader(name) if name:
                    deltas.append(self._start_call(name))
                case ArgumentsText(text) if self._is_call_open:
                    deltas.append(self._add_arguments(text))
                case ToolCall():
                    deltas += self._end_call(part)
        return deltas

    def _start_call(self, sampled_name: str) -> CallStartDelta:
        name = declared_name(sampled_name, self.generation.tool_names)
        call = PartialCall(call_id(name, self.generation.first_call + len(self.calls)), name)
        self.calls.append(call)
        self._is_call_open = True
        return CallStartDelta(len(self.calls) - 1, call.id, name)

    def _add_arguments(self, text: str) -> CallArgumentsDelta:
        self.calls[-1].arguments += text
        return CallArgumentsDelta(len(self.calls) - 1, text)

    def _end_call(self, call: ToolCall) -> list[Delta]:
        """End the open call. If none is open, add all of ``call``: as content if it has no name."""
        deltas: list[Delta] = []
        if not self._is_call_open:
            if not call.name or call.name == UNKNOWN:
                text = call.written_id + call.arguments
                self.content += text
                return [Content(text)] if text else []
            deltas.append(self._start_call(call.name))
            if call.arguments:
                deltas.append(self._add_arguments(call.arguments))
        if not self.calls[-1].arguments.strip() and call.error is None:
            deltas.append(self._add_arguments("{}"))
        self._is_call_open = False
        return deltas


def declared_name(sampled_name: str, names: Sequence[str]) -> str:
    """Return the longest of ``names`` of which ``sampled_name`` is a variant, as functionsexec5 of exec.

    Return ``sampled_name`` if it is a variant of none.
    """
    if sampled_name in names:
        return sampled_name
    matches = [name for name in names if re.fullmatch(rf"(functions)?[._]?{re.escape(name)}[:_]?\d*", sampled_name)]
    return max(matches, key=len, default=sampled_name)
