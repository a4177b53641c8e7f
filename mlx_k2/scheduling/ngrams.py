"""Draft tokens by n-gram lookup: the token that followed the previous occurrence of the text's last few tokens."""

from collections.abc import Sequence as Tokens

_LENGTHS = (4, 3, 2)
"""Numbers of tokens that may match. The longest match is used."""


class NgramIndex:
    """Every run of 2 to 4 tokens of one growing text, and the end of its last occurrence."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def update(self, token_ids: Tokens[int]) -> None:
        """Index the tokens added since the last call. A run at the end of the text waits until a token follows it."""
        for end in range(max(1, self._num_indexed), len(token_ids)):
            for length in _LENGTHS:
                if end >= length:
                    self._ends[tuple(token_ids[end - length : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids))

    def draft(self, token_ids: Tokens[int], drafts: Tokens[int]) -> int | None:
        """Return the likely token after ``token_ids`` and ``drafts``, from ``token_ids``; None if no run matches."""
        longest = max(_LENGTHS)
        tail = tuple([*token_ids[-longest:], *drafts][-longest:])
        for length in _LENGTHS:
            end = self._ends.get(tail[-length:]) if len(tail) >= length else None
            if end is not None:
                return token_ids[end]
        return None
