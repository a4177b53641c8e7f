"""Token policies of replies and raw texts: parts, constraint, stop strings, minimum length, thinking budget. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_k2.errors import RequestError
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.scheduling.token_policy import Accepted, TokenPolicy
from mlx_k2.text.reply_grammar import ReplyGrammar, ReplyGuide
from mlx_k2.text.reply_parser import Phase, ReplyReader
from mlx_k2.text.reply_parts import Content, Part
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.token_mask import TokenMask


@dataclass(frozen=True)
class ReplyLimits:
    """Limits of a reply's text. Stop strings count in the answer, not in its reasoning or its tool calls."""

    stop_strings: tuple[str, ...] = ()
    """The reply ends before the first of these."""
    min_tokens: int = 0
    """Before this number of tokens no stop token is sampled, and stop strings are ignored."""
    thinking_budget: int | None = None
    """The reasoning is closed after this number of its tokens; None sets no limit."""

    def __post_init__(self) -> None:
        """Reject an empty stop string.

        Raises:
            RequestError: a stop string is empty.
        """
        if "" in self.stop_strings:
            raise RequestError("a stop string is empty: give at least one character")


NO_LIMITS = ReplyLimits()


class ReplyPolicy(TokenPolicy):
    """The policy of one reply. ``grammar`` None allows every token.

    If ``is_raw`` is True, the reply is a text that continues the prompt: all of it is content, control tokens by their
    names.

    Raises:
        RequestError: the constraint allows only the empty text, and the request has no stop token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        limits: ReplyLimits = NO_LIMITS,
        grammar: ReplyGrammar | None = None,
        *,
        is_raw: bool = False,
    ) -> None:
        prompt_ids, stop_ids = request.prompt_ids, request.stop_ids
        # a stop token has no text, also where the request continues after it (ignore_eos)
        unread = stop_ids if is_raw else stop_ids | tokenizer.stop_ids
        self._reader = ReplyReader(tokenizer, prompt_ids, unread, is_raw=is_raw)
        self._guide = (
            None
            if grammar is None
            else ReplyGuide(grammar, tokenizer, prompt_ids, stop_ids, self._reader.phase, is_raw=is_raw)
        )
        if self._guide is not None and not stop_ids and self._guide.is_complete:
            raise RequestError("the form of the answer allows only the empty text: leave out ignore_eos")
        self._stop_ids = stop_ids
        self._tokenizer = tokenizer
        self._limits = limits
        self._stops = StopScanner(limits.stop_strings)
        self._num_tokens = 0
        self._num_thought = 0
        self._closing = () if limits.thinking_budget is None else (tokenizer.token_id("</think>"),)
        self._no_stop_token = TokenMask.all_but(stop_ids) if stop_ids else None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the reply, if one did."""
        return self._stops.found

    def accept(self, token_id: int) -> Accepted:
        """Record the next token and return the text and parts that it completes."""
        was_thinking = self._is_thinking
        read = self._reader.add(token_id)
        self._num_tokens += 1
        self._num_thought += was_thinking and self._is_thinking
        parts = self._until_stop(read.parts)
        is_over = self._stops.found is not None
        if self._guide is not None:
            if token_id not in self._stop_ids:  # one can be an ordinary token
                self._guide.accept(token_id, self._reader.phase)
            is_over = is_over or (not self._stop_ids and self._guide.is_complete)
        reason = FinishReason.STOP if is_over else None
        return Accepted(read.text, parts, reason)

    def forced(self) -> Sequence[int]:
        """Return </think> once the reasoning has used its budget, and tokens to which there is no alternative."""
        budget = self._limits.thinking_budget
        if budget is not None and self._is_thinking and self._num_thought >= budget:
            return self._closing
        return () if self._guide is None else self._guide.forced()

    def token_mask(self, draft_ids: Sequence[int]) -> TokenMask | None:
        """Return the mask of the constraint, without the stop tokens before ``min_tokens`` tokens."""
        hold_stop = self._num_tokens + len(draft_ids) < self._limits.min_tokens
        if self._guide is not None:
            return self._guide.mask(draft_ids, hold_stop=hold_stop)
        return self._no_stop_token if hold_stop else None

    def may_draft(self, draft_ids: Sequence[int], token_id: int) -> bool:
        """Return whether the constraint allows a draft token. Control tokens, which can end a phase, are excluded."""
        if self._guide is None:
            return True
        return not self._tokenizer.is_special(token_id) and self._guide.may_draft(draft_ids, token_id)

    def finish(self) -> Accepted:
        """Return the text and parts that were held back."""
        if self._stops.found is not None:
            return Accepted()
        read = self._reader.finish()
        parts = self._until_stop(read.parts)
        held = self._stops.flush()
        return Accepted(read.text, (*parts, Content(held)) if held else parts)

    @property
    def _is_thinking(self) -> bool:
        return self._reader.phase is Phase.REASONING

    def _until_stop(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """Return ``parts`` up to a stop string, less the end of the content that may be the start of one."""
        if not self._limits.stop_strings:
            return tuple(parts)
        kept: list[Part] = []
        for part in parts:
            if self._stops.found is not None:
                break
            if isinstance(part, Content):
                text = self._stops.add(part.text, count=self._num_tokens >= self._limits.min_tokens)
            else:
                text = self._stops.flush()
            if text:
                kept.append(Content(text))
            if not isinstance(part, Content):
                kept.append(part)
        return tuple(kept)


class StopScanner:
    """A search for stop strings in a text that arrives in pieces, however the pieces divide it."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended first; None so far."""

    def add(self, text: str, *, count: bool = True) -> str:
        """Return the text that can be shown now. With ``count`` False no stop string is searched for."""
        text, self._held = self._held + text, ""
        if not count:
            return text
        ends = [(at + len(stop), at, stop) for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)  # the one that ends first, as if the text came letter by letter
            return text[:at]
        num_held = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        text, self._held = text[: len(text) - num_held], text[len(text) - num_held :]
        return text

    def flush(self) -> str:
        """Return the held text: no stop string follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` with which ``stop`` begins."""
    most = min(len(text), len(stop) - 1)
    return next((length for length in range(most, 0, -1) if text.endswith(stop[:length])), 0)
