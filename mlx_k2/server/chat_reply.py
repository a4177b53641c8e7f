"""A reply as the fields of a chat completion: what each token adds, and the whole. Knows no JSON and no HTTP.

Both a stream's deltas and a whole body are made here, so that they always agree.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.handle import Event, Finished, Token
from mlx_k2.scheduling.request import FinishReason
from mlx_k2.server.language_model import Generation
from mlx_k2.server.turn_store import new_handle
from mlx_k2.text.message import CalledFunction, Message, MessageCall
from mlx_k2.text.reply_parts import ArgumentsText, Content, Part, Reasoning, ToolCallBegun
from mlx_k2.text.tool_call import UNKNOWN, ToolCall, call_id


@dataclass(frozen=True)
class CallBegun:
    """A change for the client: tool call number ``index``, counted from 0, begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A change for the client: a further part of the arguments of tool call ``index``, as JSON text."""

    index: int
    text: str


Delta: TypeAlias = Reasoning | Content | CallBegun | CallArguments


@dataclass
class WrittenCall:
    """A tool call so far."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class ChatReply:
    """The reply to one request so far."""

    generation: Generation
    on_end: "Callable[[ChatReply], None]" = lambda _: None
    """Called with the reply when it ends with STOP or LENGTH."""
    handle: str = field(default_factory=new_handle)
    """The handle of the turn in the turn store."""
    reasoning: str = ""
    content: str = ""
    calls: list[WrittenCall] = field(default_factory=list)
    content_tokens: list[Token] = field(default_factory=list)
    """The tokens of the content, for their log-probabilities."""
    num_reasoning_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    summary: AnswerSummary | None = None
    """Set at the end."""

    def __post_init__(self) -> None:
        self._kind: type[Part] = Reasoning if self.generation.in_reasoning else Content
        self._textless: list[Token] = []  # tokens that completed no text yet, with log-probabilities
        self._is_call_open = False
        self._num_returned = 0

    def add(self, event: Event) -> list[Delta]:
        """Add what an event completes; return it as deltas."""
        match event:
            case Token():
                self.token_ids.append(event.token_id)
                self._count(event)
                return self._add_parts(event.parts)
            case Finished():
                if any(isinstance(part, Content) for part in event.parts):
                    self.content_tokens += self._textless
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
        """The API's word for the end: length after a limit or in an open call, else tool_calls or stop."""
        reason = None if self.summary is None else self.summary.finish_reason
        if self._is_call_open or reason in (FinishReason.LENGTH, FinishReason.TIMEOUT):
            return "length"
        return "tool_calls" if self.calls else "stop"

    def next_content_tokens(self) -> list[Token]:
        """Return the tokens of the content that the previous call of this function did not return."""
        found = self.content_tokens[self._num_returned :]
        self._num_returned += len(found)
        return found

    def _count(self, token: Token) -> None:
        """Count a token. One without parts has the kind of that before it; its log-probability waits for content."""
        if token.parts:
            self._kind = type(token.parts[-1])
        self.num_reasoning_tokens += self._kind is Reasoning
        if token.logprob is None or self.generation.tokenizer.is_special(token.token_id):
            return
        if not token.parts:
            self._textless.append(token)
            return
        if any(isinstance(part, Content) for part in token.parts):
            self.content_tokens += [*self._textless, token]
        self._textless.clear()

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
                case ToolCallBegun(name) if name:
                    deltas.append(self._begin_call(name))
                case ArgumentsText(text) if self._is_call_open:
                    deltas.append(self._arguments(text))
                case ToolCall():
                    deltas += self._end_call(part)
        return deltas

    def _begin_call(self, written_name: str) -> CallBegun:
        name = declared_name(written_name, self.generation.tool_names)
        written = WrittenCall(call_id(name, self.generation.first_call + len(self.calls)), name)
        self.calls.append(written)
        self._is_call_open = True
        return CallBegun(len(self.calls) - 1, written.id, name)

    def _arguments(self, text: str) -> CallArguments:
        self.calls[-1].arguments += text
        return CallArguments(len(self.calls) - 1, text)

    def _end_call(self, call: ToolCall) -> list[Delta]:
        """End the open call. A call that has not begun gets its header here; one without a name becomes content."""
        deltas: list[Delta] = []
        if not self._is_call_open:
            if not call.name or call.name == UNKNOWN:
                text = call.written_id + call.arguments
                self.content += text
                return [Content(text)] if text else []
            deltas.append(self._begin_call(call.name))
            if call.arguments:
                deltas.append(self._arguments(call.arguments))
        if not self.calls[-1].arguments.strip() and call.error is None:
            deltas.append(self._arguments("{}"))
        self._is_call_open = False
        return deltas


def declared_name(written: str, names: Sequence[str]) -> str:
    """Return the tool that a name means: the model may write its whole id without separators, as functionsexec5."""
    meant = [name for name in names if re.fullmatch(rf"(functions)?[._]?{re.escape(name)}[:_]?\d*", written)]
    return written if written in names else max(meant, key=len, default=written)
