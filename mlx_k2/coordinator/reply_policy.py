"""Token policy of replies and raw texts: parts, constraint, stop strings, minimum length, thinking budget. Pure."""

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
    """Limits of a reply.

    Raises:
        RequestError: a stop string is empty.
    """

    stop_strings: tuple[str, ...] = ()
    """The reply ends before the first stop string in its content. Reasoning and tool calls are not searched."""
    min_tokens: int = 0
    """The first ``min_tokens`` tokens include no stop token, unless the grammar allows no other token. Stop strings are
    searched for from token number ``min_tokens`` on."""
    thinking_budget: int | None = None
    """The reasoning is closed after this number of its tokens; None sets no limit."""

    def __post_init__(self) -> None:
        """Reject an empty stop string."""
        if "" in self.stop_strings:
            raise RequestError("a stop string is empty: give at least one character")


NO_LIMITS = ReplyLimits()


class ReplyPolicy(TokenPolicy):
    """The policy of one reply. ``grammar`` None allows every token.

    If ``is_raw`` is True, the reply is a text that continues the prompt: all of it is content, and control tokens are
    written by their names.

    Raises:
        RequestError: the grammar allows only the empty text, and the request has no stop token.
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
        # a model's stop token has no text, also where the request continues after it (ignore_eos)
        textless_ids = stop_ids if is_raw else stop_ids | tokenizer.stop_ids
        self._reader = ReplyReader(tokenizer, prompt_ids, textless_ids, is_raw=is_raw)
        self._guide: ReplyGuide | None = None
        if grammar is not None:
            self._guide = ReplyGuide(grammar, tokenizer, prompt_ids, stop_ids, self._reader.phase, is_raw=is_raw)
        if self._guide is not None and not stop_ids and self._guide.is_complete:
            raise RequestError("the form of the answer allows only the empty text: leave out ignore_eos")
        self._stop_ids = stop_ids
        self._tokenizer = tokenizer
        self._limits = limits
        self._stops = StopScanner(limits.stop_strings)
        self._num_tokens = 0
        self._num_thinking_tokens = 0
        self._end_of_thinking = () if limits.thinking_budget is None else (tokenizer.token_id("</think>"),)
        self._no_stop_token = TokenMask.all_but(stop_ids) if stop_ids else None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the reply, if one did."""
        return self._stops.found

    def accept(self, token_id: int) -> Accepted:
        """Record the next token and return the text and parts that it completes."""
        was_thinking = self._is_thinking
        completed = self._reader.add(token_id)
        self._num_tokens += 1
        if was_thinking and self._is_thinking:
            self._num_thinking_tokens += 1
        parts = self._until_stop_string(completed.parts)
        is_over = self._stops.found is not None
        if self._guide is not None:
            if token_id not in self._stop_ids:  # the grammar may allow a stop token as an ordinary one
                self._guide.accept(token_id, self._reader.phase)
            is_over = is_over or (not self._stop_ids and self._guide.is_complete)
        reason = FinishReason.STOP if is_over else None
        return Accepted(completed.text, parts, reason)

    def forced(self) -> Sequence[int]:
        """Return </think> if the reasoning has used its budget, else the tokens to which there is no alternative."""
        budget = self._limits.thinking_budget
        if budget is not None and self._is_thinking and self._num_thinking_tokens >= budget:
            return self._end_of_thinking
        return () if self._guide is None else self._guide.forced()

    def token_mask(self, draft_ids: Sequence[int]) -> TokenMask | None:
        """Return the mask of the grammar, without stop tokens before ``min_tokens`` tokens."""
        hold_stop = self._num_tokens + len(draft_ids) < self._limits.min_tokens
        if self._guide is not None:
            return self._guide.mask(draft_ids, hold_stop=hold_stop)
        return self._no_stop_token if hold_stop else None

    def may_draft(self, draft_ids: Sequence[int], token_id: int) -> bool:
        """Return whether the grammar allows a draft token. Control tokens, which can end a phase, are excluded."""
        if self._guide is None:
            return True
        return not self._tokenizer.is_special(token_id) and self._guide.may_draft(draft_ids, token_id)

    def finish(self) -> Accepted:
        """Return the text and parts that were held back."""
        if self._stops.found is not None:
            return Accepted()
        completed = self._reader.finish()
        parts = self._until_stop_string(completed.parts)
        held_text = self._stops.flush()
        return Accepted(completed.text, (*parts, Content(held_text)) if held_text else parts)

    @property
    def _is_thinking(self) -> bool:
        return self._reader.phase is Phase.REASONING

    def _until_stop_string(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """Return ``parts`` up to a stop string. Hold back the end of the content that may be the start of one."""
        if not self._limits.stop_strings:
            return tuple(parts)
        kept: list[Part] = []
        for part in parts:
            if self._stops.found is not None:
                break
            if isinstance(part, Content):
                text = self._stops.add(part.text, can_stop=self._num_tokens >= self._limits.min_tokens)
            else:
                text = self._stops.flush()
            if text:
                kept.append(Content(text))
            if not isinstance(part, Content):
                kept.append(part)
        return tuple(kept)


class StopScanner:
    """A search for stop strings in a text that arrives in pieces. The result does not depend on the pieces."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._held_text = ""
        self.found: str | None = None
        """The stop string that occurred; None if none has."""

    def add(self, text: str, *, can_stop: bool = True) -> str:
        """Return the text before a stop string, or the text that cannot be part of one.

        With ``can_stop`` False no stop string is searched for.
        """
        text, self._held_text = self._held_text + text, ""
        if not can_stop:
            return text
        found = [stop for stop in self._stop_strings if stop in text]
        if found:
            # the one that ends first, as if the text came letter by letter; of several that end together the longest
            self.found = min(found, key=lambda stop: (text.find(stop) + len(stop), -len(stop)))
            return text[: text.find(self.found)]
        num_held = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        text, self._held_text = text[: len(text) - num_held], text[len(text) - num_held :]
        return text

    def flush(self) -> str:
        """Return the text that ``add`` held back. Call this when no text follows that could complete a stop string."""
        held_text, self._held_text = self._held_text, ""
        return held_text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` with which ``stop`` begins."""
    max_length = min(len(text), len(stop) - 1)
    return next((length for length in range(max_length, 0, -1) if text.endswith(stop[:length])), 0)
