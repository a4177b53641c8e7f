"""Parsing of a streamed reply into reasoning, content and tool calls. Knows no messages and runs no tool."""

import codecs
import enum
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlx_k2.text.markers import Found, Marker, MarkerScanner
from mlx_k2.text.prompt import opens_reasoning
from mlx_k2.text.reply_parts import ArgumentsText, Content, Part, Reasoning, ToolCallHeader
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.text.tool_call import ToolCall, broken_call, read_call, tool_name


class Phase(enum.Enum):
    """The part of a reply to which the next ordinary token belongs."""

    REASONING = enum.auto()
    CONTENT = enum.auto()
    SECTION = enum.auto()
    """In a tool section, between calls."""
    CALL_ID = enum.auto()
    ARGUMENTS = enum.auto()


_SPEECH: Mapping[Phase, type[Reasoning] | type[Content]] = {Phase.REASONING: Reasoning, Phase.CONTENT: Content}
"""The phases outside of tool sections, and the parts that their text makes."""


class ReplyParser:
    """A parser of one reply. The joined parts do not depend on how the reply's text is cut into pieces.

    ``control_names`` are the control tokens of the vocabulary. A marker that is one of them counts only when it is
    passed to ``control`` as a sampled token, never where text spells it. Of the markers that the vocabulary lacks, a
    section marker counts only next to a call. A quoted marker thus neither ends the reasoning nor starts a call.

    ``in_reasoning`` is True if the prompt opened the reasoning (K2.5 and later), False if the model does (K2 Thinking).
    """

    def __init__(self, control_names: Collection[str], *, in_reasoning: bool) -> None:
        self._scanner = MarkerScanner(control_names)
        self.phase = Phase.REASONING if in_reasoning else Phase.CONTENT
        """The part of the reply to which the next text would belong."""
        self._at_start = True
        self._held = ""  # text to drop if a marker follows: space at the start, a spelled section marker
        self._at_spelled_section = False
        self._after_call = Phase.CONTENT
        self._id: list[str] = []
        self._arguments: list[str] = []

    def text(self, text: str) -> Iterator[Part]:
        """Yield the parts that the next ordinary text completes."""
        return self._read(self._scanner.text(text))

    def control(self, name: str) -> Iterator[Part]:
        """Yield the parts that the control token ``name`` completes. Do not pass tokens that end the reply."""
        return self._read(self._scanner.control(name))

    def finish(self) -> Iterator[Part]:
        """Yield the remaining parts. A call that has no end is broken, even if its arguments look complete."""
        yield from self._read(self._scanner.flush())
        yield from self._release()
        if self.phase in (Phase.CALL_ID, Phase.ARGUMENTS):
            yield self._broken("the reply ended inside the call")

    def _read(self, pieces: Iterable[str | Found]) -> Iterator[Part]:
        for piece in pieces:
            if isinstance(piece, str):
                yield from self._on_text(piece)
            elif self.phase in _SPEECH:
                yield from self._outside_section(piece)
            elif self.phase is Phase.SECTION:
                yield from self._in_section(piece)
            else:
                yield from self._in_call(piece)

    def _on_text(self, text: str) -> Iterator[Part]:
        match self.phase:
            case Phase.REASONING | Phase.CONTENT if text.isspace() and (self._at_start or self._at_spelled_section):
                self._held += text
            case Phase.REASONING | Phase.CONTENT:
                yield from self._release()
                yield _SPEECH[self.phase](text)
            case Phase.SECTION if not text.isspace():  # treated as a call whose first marker is missing
                self._begin_call(Phase.SECTION)
                self._id.append(text.lstrip())
            case Phase.CALL_ID:
                self._id.append(text)
            case Phase.ARGUMENTS:
                self._arguments.append(text)
                yield ArgumentsText(text)

    def _outside_section(self, found: Found) -> Iterator[Part]:
        match found.marker:
            case Marker.THINK_BEGIN if found.is_token or self._at_start:
                if self._at_start:
                    self._drop_held()
                yield from self._release()
                self.phase = Phase.REASONING
            case Marker.THINK_END if found.is_token or self.phase is Phase.REASONING:
                yield from self._release()
                self.phase = Phase.CONTENT
            case Marker.SECTION_BEGIN if found.is_token:
                yield from self._release()
                self.phase = Phase.SECTION
            case Marker.SECTION_BEGIN:
                yield from self._release()
                self._held, self._at_spelled_section = found.name, True
            case Marker.CALL_BEGIN if found.is_token or self._at_spelled_section:
                in_section = self._at_spelled_section
                if in_section:
                    self._drop_held()
                yield from self._release()
                self._begin_call(Phase.SECTION if in_section else Phase.CONTENT)
            case _ if not found.is_token:
                yield from self._on_text(found.name)

    def _in_section(self, found: Found) -> Iterator[Part]:
        match found.marker:
            case Marker.CALL_BEGIN:
                self._begin_call(Phase.SECTION)
            case Marker.SECTION_END:
                self.phase = Phase.CONTENT
            case Marker.ARGUMENTS_BEGIN:
                self._begin_call(Phase.SECTION)
                yield self._begin_arguments()
            case Marker.THINK_BEGIN | Marker.THINK_END if not found.is_token:
                yield from self._on_text(found.name)

    def _in_call(self, found: Found) -> Iterator[Part]:
        match found.marker:
            case Marker.ARGUMENTS_BEGIN if self.phase is Phase.CALL_ID:
                yield self._begin_arguments()
            case Marker.CALL_END:
                yield self._ended_call()
            case Marker.CALL_BEGIN if found.is_token:
                after = self._after_call
                yield self._ended_call()
                self._begin_call(after)
            case Marker.SECTION_END if found.is_token:
                yield self._ended_call()
                self.phase = Phase.CONTENT
            case _:
                yield from self._on_text(found.name)

    def _begin_call(self, after: Phase) -> None:
        self.phase, self._after_call = Phase.CALL_ID, after
        self._id, self._arguments = [], []

    def _begin_arguments(self) -> ToolCallHeader:
        self.phase = Phase.ARGUMENTS
        return ToolCallHeader(tool_name("".join(self._id)))

    def _ended_call(self) -> ToolCall:
        if self.phase is Phase.CALL_ID:
            return self._broken("it has no <|tool_call_argument_begin|>")
        self.phase = self._after_call
        return read_call("".join(self._id), "".join(self._arguments))

    def _broken(self, problem: str) -> ToolCall:
        self.phase = self._after_call
        return broken_call("".join(self._id + self._arguments), problem)

    def _release(self) -> Iterator[Part]:
        """Yield the held-back text as reasoning or content."""
        held = self._held
        self._drop_held()
        if held:
            yield _SPEECH[self.phase](held)

    def _drop_held(self) -> None:
        self._held, self._at_spelled_section, self._at_start = "", False, False


class _RawText:
    """A parser of a text that continues a raw prompt."""

    phase = Phase.CONTENT

    def text(self, text: str) -> Iterator[Part]:
        """Yield the text as content."""
        if text:
            yield Content(text)

    control = text

    def finish(self) -> Iterator[Part]:
        """Yield nothing: no text is held."""
        return iter(())


@dataclass(frozen=True)
class ReplyText:
    """The text of a token, control tokens spelled by their names, and the parts of the reply that it completes."""

    text: str
    parts: tuple[Part, ...]


class ReplyReader:
    """A reader of the reply to one prompt. A token of ``stop_ids`` ends the reply; it has no text.

    The joined texts equal the whole reply decoded at once: bytes that are not UTF-8 become U+FFFD, control tokens their
    names. If ``is_raw`` is True, all text is content.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop_ids: Collection[int], *, is_raw: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._parser: ReplyParser | _RawText = _RawText()
        if not is_raw:
            self._parser = ReplyParser(tokenizer.special_ids, in_reasoning=opens_reasoning(tokenizer, prompt_ids))

    @property
    def phase(self) -> Phase:
        """The part of the reply to which the next text would belong, judged by the tokens so far."""
        return self._parser.phase

    def add(self, token_id: int) -> ReplyText:
        """Return the text that ``token_id`` completes, '' while a character is incomplete, and the parts."""
        if token_id in self._stop_ids:
            return ReplyText("", ())
        data = self._tokenizer.token_bytes(token_id)
        if self._tokenizer.is_special(token_id):
            rest, name = self._rest(), data.decode()
            return ReplyText(rest + name, (*self._parser.text(rest), *self._parser.control(name)))
        text = self._decoder.decode(data)
        return ReplyText(text, tuple(self._parser.text(text)))

    def finish(self) -> ReplyText:
        """Return the remaining text and parts when no token follows."""
        rest = self._rest()
        return ReplyText(rest, (*self._parser.text(rest), *self._parser.finish()))

    def _rest(self) -> str:
        """Return the text for an incomplete character; the next token starts a new text."""
        return self._decoder.decode(b"", final=True)
