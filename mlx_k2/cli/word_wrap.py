"""Word wrap of text that is streamed to a terminal. Knows no terminal."""

import re
from collections.abc import Sequence

from rich.cells import cell_len

# ranges of characters that occupy two columns, such as CJK
_WIDE = (
    "\u1100-\u115f\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6\U00020000-\U0003fffd"
)
_PIECES = re.compile(rf"\n|[^\S\n]+|[{_WIDE}]|[^\s{_WIDE}]+")
"""A line end, spaces, one wide character (a line may break after it), or a word."""


class WordWrap:
    """The end of the shown text: its column, and the last word with the spaces before it, which is not shown yet."""

    def __init__(self) -> None:
        self.column = 0
        self._last_word = ""

    def add(self, text: str, width: int) -> str:
        """Add text; return the text to show now, in lines of ``width`` columns. A word that may continue is kept."""
        pieces = _PIECES.findall(self._last_word + text)
        num_complete = len(pieces)
        if pieces and pieces[-1] != "\n" and cell_len(pieces[-1][0]) < 2:  # a wide character is complete, too
            follows_spaces = len(pieces) > 1 and pieces[-2].isspace() and pieces[-2] != "\n"
            num_complete -= 2 if follows_spaces else 1
        self._last_word = "".join(pieces[num_complete:])
        return self._lines(pieces[:num_complete], width)

    def rest(self, width: int) -> str:
        """Return the text that is not shown yet. The next text begins a line."""
        rest = self._lines(_PIECES.findall(self._last_word.rstrip()), width)
        self.column, self._last_word = 0, ""
        return rest

    def _lines(self, pieces: Sequence[str], width: int) -> str:
        """Return the pieces with a line end in place of spaces where the next piece does not fit."""
        shown = []
        spaces = ""
        for piece in pieces:
            if piece != "\n" and piece.isspace():
                spaces = piece
                continue
            if piece == "\n":
                self.column, spaces = 0, ""
            elif self.column + len(spaces) + cell_len(piece) > width:
                if self.column:
                    shown.append("\n")
                self.column, spaces = cell_len(piece), ""
            else:
                self.column += len(spaces) + cell_len(piece)
            shown.append(spaces + piece)
            spaces = ""
        return "".join(shown)
