"""The n-gram drafter, which proposes tokens from the text itself, and the modes of drafting."""

import enum
from collections.abc import Sequence as Tokens

from mlx_k2.errors import RequestError

_LENGTHS = (4, 3, 2)
"""Numbers of tokens that may match. The longest match is used."""


class DraftMode(enum.Enum):
    """Source of draft tokens. AUTO chooses between the draft model, n-grams and none while an answer runs."""

    AUTO = "auto"
    OFF = "off"
    NGRAM = "ngram"
    MODEL = "model"

    @property
    def uses_head(self) -> bool:
        """Whether a draft head is used, if there is one."""
        return self in (DraftMode.AUTO, DraftMode.MODEL)


def effective_mode(mode: DraftMode, *, has_head: bool) -> DraftMode:
    """Return the mode to schedule with: without a draft head, AUTO is NGRAM.

    Raises:
        RequestError: MODEL, and there is no head.
    """
    if has_head or mode in (DraftMode.OFF, DraftMode.NGRAM):
        return mode
    if mode is DraftMode.MODEL:
        raise RequestError("--draft model needs a draft model, and there is none: give --draft-model")
    return DraftMode.NGRAM


class NgramDrafter:
    """A drafter that proposes the token after the previous occurrence of the text's last 2 to 4 tokens.

    A wrong draft costs a position of a step, never a wrong token.

    The index maps every run of 2 to 4 tokens to the end of its last occurrence. After ``truncate`` it may have runs of
    the removed text; a match is therefore compared with the text before it is used.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def index(self, token_ids: Tokens[int], max_tokens: int) -> bool:
        """Index up to ``max_tokens`` more tokens of the text; return whether some are left.

        A run at the end of the text waits until a token follows it.
        """
        last = min(len(token_ids), max(1, self._num_indexed) + max_tokens)
        for end in range(max(1, self._num_indexed), last):
            for length in _LENGTHS:
                if end >= length:
                    self._ends[tuple(token_ids[end - length : end])] = end
        self._num_indexed = max(self._num_indexed, last)
        return self._num_indexed < len(token_ids)

    def draft(self, token_ids: Tokens[int], drafts: Tokens[int], shortest: int = 0) -> int | None:
        """Return the likely token after ``token_ids`` and ``drafts``, from ``token_ids``; None if no run matches.

        A run of fewer than ``shortest`` tokens does not count.
        """
        longest = max(_LENGTHS)
        tail = tuple([*token_ids[-longest:], *drafts][-longest:])
        for length in (length for length in _LENGTHS if length >= shortest):
            run = tail[-length:]
            end = self._ends.get(run) if len(tail) >= length else None
            if end is not None and end < len(token_ids) and tuple(token_ids[end - length : end]) == run:
                return token_ids[end]
        return None

    def truncate(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens of the text. Others follow them from now on."""
        self._num_indexed = min(self._num_indexed, num_tokens)
