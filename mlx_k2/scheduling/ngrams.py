"""Guesses the next token from a sequence's own text: what followed the last few tokens when they last stood there."""

from collections.abc import Sequence as Tokens

_LENGTHS = (4, 3, 2)
"""How many tokens must repeat; the longest match is believed first."""


class NgramIndex:
    """Every run of 2 to 4 tokens of one growing text, and where the last such run ended."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def update(self, token_ids: Tokens[int]) -> None:
        """Take in what was added since the last call; runs at the very end wait until a token follows them."""
        for end in range(max(1, self._num_indexed), len(token_ids)):
            for length in _LENGTHS:
                if end >= length:
                    self._ends[tuple(token_ids[end - length : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids))

    def draft(self, token_ids: Tokens[int], drafts: Tokens[int]) -> int | None:
        """The token after ``token_ids`` and ``drafts``, by its last precedent in ``token_ids``; None without one."""
        longest = max(_LENGTHS)
        tail = tuple([*token_ids[-longest:], *drafts][-longest:])
        for length in _LENGTHS:
            end = self._ends.get(tail[-length:]) if len(tail) >= length else None
            if end is not None:
                return token_ids[end]
        return None
