"""The n-gram drafter, which proposes tokens from the text itself, and the modes of drafting."""

import enum
from collections.abc import Sequence

from mlx_k2.errors import RequestError

_LENGTHS = (4, 3, 2)  # lengths of the n-grams, in tokens. The longest one that matches is used


class DraftMode(enum.Enum):
    """Source of draft tokens. AUTO chooses between the draft model, n-grams and none while an answer runs."""

    AUTO = "auto"
    OFF = "off"
    NGRAM = "ngram"
    MODEL = "model"

    @property
    def uses_head(self) -> bool:
        """True if a draft head is used, provided that there is one."""
        return self in (DraftMode.AUTO, DraftMode.MODEL)


def effective_mode(mode: DraftMode, *, has_head: bool) -> DraftMode:
    """Return the mode to schedule with: without a draft head, AUTO becomes NGRAM.

    Raises:
        RequestError: the mode is MODEL, and there is no draft head.
    """
    if has_head or mode in (DraftMode.OFF, DraftMode.NGRAM):
        return mode
    if mode is DraftMode.MODEL:
        raise RequestError("--draft model needs a draft model, and there is none: give --draft-model")
    return DraftMode.NGRAM


class NgramDrafter:
    """A drafter that proposes the token after the previous occurrence of the text's last 2 to 4 tokens.

    The index maps every n-gram to the end of its last occurrence. After ``truncate`` it may have n-grams of the removed
    text; a match is therefore compared with the text before it is used.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def index(self, token_ids: Sequence[int], max_tokens: int) -> bool:
        """Index up to ``max_tokens`` more tokens of the text; return whether some are left.

        An n-gram at the end of the text is indexed once a token follows it.
        """
        start = max(1, self._num_indexed)
        stop = min(len(token_ids), start + max_tokens)
        for end in range(start, stop):
            for length in _LENGTHS:
                if end >= length:
                    self._ends[tuple(token_ids[end - length : end])] = end
        self._num_indexed = max(self._num_indexed, stop)
        return self._num_indexed < len(token_ids)

    def draft(self, token_ids: Sequence[int], draft_ids: Sequence[int], min_tokens: int = 0) -> int | None:
        """Return the token after an earlier occurrence of the last tokens of ``token_ids`` and then ``draft_ids``.

        Return None if no n-gram of at least ``min_tokens`` tokens occurs in ``token_ids`` with a token after it.
        """
        longest = max(_LENGTHS)
        tail = tuple([*token_ids[-longest:], *draft_ids][-longest:])
        for length in _LENGTHS:
            if not min_tokens <= length <= len(tail):
                continue
            ngram = tail[-length:]
            end = self._ends.get(ngram)
            if end is not None and end < len(token_ids) and tuple(token_ids[end - length : end]) == ngram:
                return token_ids[end]
        return None

    def truncate(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens of the text. Other tokens may follow them from now on."""
        self._num_indexed = min(self._num_indexed, num_tokens)
