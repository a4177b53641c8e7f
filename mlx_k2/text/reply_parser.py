"""The parser of a streamed reply: reasoning, content and tool calls. Knows no messages and runs no tool."""

import codecs
import enum
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlx_k2.text.markers import Marker, MarkerMatch, MarkerScanner
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


_TEXT_PARTS: Mapping[Phase, type[Reasoning] | type[Content]] = {Phase.REASONING: Reasoning, Phase.CONTENT: Content}
"""The types of parts for text outside of tool sections, by phase."""


class ReplyParser:
    """A parser of one reply. Its joined parts do not depend on how the reply's text is passed.

    ``control_names`` are the control tokens of the vocabulary. A marker among them counts only as a sampled token,
    passed to ``control``, and not where text spells it: a quoted marker neither ends the reasoning nor starts a call.
    Any other marker also counts where text spells it, if it fits there: <think> only at the start, </think> only in the
    reasoning, a section marker only if a call follows, and the markers of calls only in a section or a call.

    ``in_reasoning`` is True if the prompt ends inside the reasoning (K2.5 and later), False if the model writes <think>
    itself (K2 Thinking).
    """

    def __init__(self, control_names: Collection[str], *, in_reasoning: bool) -> None:
        self._scanner = MarkerScanner(control_names)
        self.phase = Phase.REASONING if in_reasoning else Phase.CONTENT
        """The part of the reply to which the next text would belong."""
        self._at_start = True
        self._pending = ""
        """Space at the start, which is dropped before <think>; or a spelled section marker and the space after it,
        which are dropped before a call."""
        self._at_spelled_section = False  # after a section marker that text spells
        self._phase_after_call = Phase.CONTENT
        self._id: list[str] = []
        self._arguments: list[str] = []

    def text(self, text: str) -> Iterator[Part]:
        """Yield the parts that the next ordinary text completes."""
        return self._read(self._scanner.text(text))

    def control(self, name: str) -> Iterator[Part]:
        """Yield the parts that the control token ``name`` completes. Do not pass a stop token."""
        return self._read(self._scanner.control(name))

    def finish(self) -> Iterator[Part]:
        """Yield the remaining parts. A call without an end marker is broken, even if its arguments look complete."""
        yield from self._read(self._scanner.flush())
        yield from self._release()
        if self.phase in (Phase.CALL_ID, Phase.ARGUMENTS):
            yield self._end_broken_call("the reply ended inside the call")

    def _read(self, pieces: Iterable[str | MarkerMatch]) -> Iterator[Part]:
        for piece in pieces:
            if isinstance(piece, str):
                yield from self._on_text(piece)
            elif self.phase in _TEXT_PARTS:
                yield from self._on_marker_outside_section(piece)
            elif self.phase is Phase.SECTION:
                yield from self._on_marker_in_section(piece)
            else:
                yield from self._on_marker_in_call(piece)

    def _on_text(self, text: str) -> Iterator[Part]:
        match self.phase:
            case Phase.REASONING | Phase.CONTENT if text.isspace() and (self._at_start or self._at_spelled_section):
                self._pending += text
            case Phase.REASONING | Phase.CONTENT:
                yield from self._release()
                yield _TEXT_PARTS[self.phase](text)
            case Phase.SECTION if not text.isspace():  # a call whose first marker is missing
                self._begin_call(Phase.SECTION)
                self._id.append(text.lstrip())
            case Phase.CALL_ID:
                self._id.append(text)
            case Phase.ARGUMENTS:
                self._arguments.append(text)
                yield ArgumentsText(text)

    def _on_marker_outside_section(self, marker_match: MarkerMatch) -> Iterator[Part]:
        match marker_match.marker:
            case Marker.THINK_BEGIN if marker_match.is_token or self._at_start:
                if self._at_start:
                    self._drop_pending()
                yield from self._release()
                self.phase = Phase.REASONING
            case Marker.THINK_END if marker_match.is_token or self.phase is Phase.REASONING:
                yield from self._release()
                self.phase = Phase.CONTENT
            case Marker.SECTION_BEGIN if marker_match.is_token:
                yield from self._release()
                self.phase = Phase.SECTION
            case Marker.SECTION_BEGIN:
                yield from self._release()
                self._pending, self._at_spelled_section = marker_match.name, True
            case Marker.CALL_BEGIN if marker_match.is_token or self._at_spelled_section:
                in_section = self._at_spelled_section
                if in_section:
                    self._drop_pending()
                yield from self._release()
                self._begin_call(Phase.SECTION if in_section else Phase.CONTENT)
            case _ if not marker_match.is_token:  # a marker that is a token and does not fit here is dropped
                yield from self._on_text(marker_match.name)

    def _on_marker_in_section(self, marker_match: MarkerMatch) -> Iterator[Part]:
        match marker_match.marker:
            case Marker.CALL_BEGIN:
                self._begin_call(Phase.SECTION)
            case Marker.SECTION_END:
                self.phase = Phase.CONTENT
            case Marker.ARGUMENTS_BEGIN:
                self._begin_call(Phase.SECTION)
                yield self._begin_arguments()
            case Marker.THINK_BEGIN | Marker.THINK_END if not marker_match.is_token:
                yield from self._on_text(marker_match.name)

    def _on_marker_in_call(self, marker_match: MarkerMatch) -> Iterator[Part]:
        match marker_match.marker:
            case Marker.ARGUMENTS_BEGIN if self.phase is Phase.CALL_ID:
                yield self._begin_arguments()
            case Marker.CALL_END:
                yield self._end_call()
            case Marker.CALL_BEGIN if marker_match.is_token:
                phase_after = self._phase_after_call
                yield self._end_call()
                self._begin_call(phase_after)
            case Marker.SECTION_END if marker_match.is_token:
                yield self._end_call()
                self.phase = Phase.CONTENT
            case _:
                yield from self._on_text(marker_match.name)

    def _begin_call(self, phase_after: Phase) -> None:
        self.phase, self._phase_after_call = Phase.CALL_ID, phase_after
        self._id, self._arguments = [], []

    def _begin_arguments(self) -> ToolCallHeader:
        self.phase = Phase.ARGUMENTS
        return ToolCallHeader(tool_name("".join(self._id)))

    def _end_call(self) -> ToolCall:
        if self.phase is Phase.CALL_ID:
            return self._end_broken_call("it has no <|tool_call_argument_begin|>")
        self.phase = self._phase_after_call
        return read_call("".join(self._id), "".join(self._arguments))

    def _end_broken_call(self, problem: str) -> ToolCall:
        self.phase = self._phase_after_call
        return broken_call("".join(self._id + self._arguments), problem)

    def _release(self) -> Iterator[Part]:
        """Yield the held-back text as reasoning or content."""
        text = self._pending
        self._drop_pending()
        if text:
            yield _TEXT_PARTS[self.phase](text)

    def _drop_pending(self) -> None:
        self._pending, self._at_spelled_section, self._at_start = "", False, False


class _RawReplyParser:
    """A parser of a reply to a raw prompt: all text is content."""

    phase = Phase.CONTENT

    def text(self, text: str) -> Iterator[Part]:
        """Yield the text as content."""
        if text:
            yield Content(text)

    control = text

    def finish(self) -> Iterator[Part]:
        """Yield nothing: no text is held back."""
        return iter(())


@dataclass(frozen=True)
class TokenText:
    """The text of a token (of a control token its name), and the parts of the reply that the token completes."""

    text: str
    parts: tuple[Part, ...]


class ReplyReader:
    """A reader of the reply to one prompt. A token of ``stop_ids`` has no text.

    The joined texts equal the reply decoded at once, with U+FFFD for bytes that are not UTF-8, and with the names of
    control tokens. If ``is_raw`` is True, all text is content.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop_ids: Collection[int], *, is_raw: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._parser: ReplyParser | _RawReplyParser = _RawReplyParser()
        if not is_raw:
            self._parser = ReplyParser(tokenizer.special_ids, in_reasoning=opens_reasoning(tokenizer, prompt_ids))

    @property
    def phase(self) -> Phase:
        """The part of the reply to which the next ordinary token belongs."""
        return self._parser.phase

    def add(self, token_id: int) -> TokenText:
        """Return the text that ``token_id`` completes ('' while a character is incomplete), and the parts."""
        if token_id in self._stop_ids:
            return TokenText("", ())
        data = self._tokenizer.token_bytes(token_id)
        if self._tokenizer.is_special(token_id):
            rest, name = self._flush_decoder(), data.decode()
            return TokenText(rest + name, (*self._parser.text(rest), *self._parser.control(name)))
        text = self._decoder.decode(data)
        return TokenText(text, tuple(self._parser.text(text)))

    def finish(self) -> TokenText:
        """Return the remaining text and parts. Call this after the last token."""
        rest = self._flush_decoder()
        return TokenText(rest, (*self._parser.text(rest), *self._parser.finish()))

    def _flush_decoder(self) -> str:
        """Return U+FFFD for an incomplete character, else ''; the next token starts a new character."""
        return self._decoder.decode(b"", final=True)
