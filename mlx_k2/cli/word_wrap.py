"""Lines of text that is streamed to a terminal: no word is cut that fits into a line. Knows no terminal."""

import re
from collections.abc import Sequence

from rich.cells import cell_len

# characters of two columns, such as CJK
_WIDE = (
    "\u1100-\u115f\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6\U00020000-\U0003fffd"
)
_PIECES = re.compile(rf"\n|[^\S\n]+|[{_WIDE}]|[^\s{_WIDE}]+")
"""A line end, spaces, one wide character (a line may break after it), or a word."""


class WordWrap:
    """The state at the end of the shown text: its column, and the last word with the spaces before it, held back."""

    def __init__(self) -> None:
        self.column = 0
        self._held = ""

    def add(self, text: str, width: int) -> str:
        """Add text; return what can be shown now, in lines of ``width`` columns. A word that may go on is held back."""
        pieces = _PIECES.findall(self._held + text)
        num_complete = len(pieces)
        if pieces and pieces[-1] != "\n" and cell_len(pieces[-1][0]) < 2:
            follows_spaces = len(pieces) > 1 and pieces[-2].isspace() and pieces[-2] != "\n"
            num_complete -= 2 if follows_spaces else 1
        self._held = "".join(pieces[num_complete:])
        return self._lines(pieces[:num_complete], width)

    def rest(self, width: int) -> str:
        """Return what is held back; the next text begins a line."""
        rest = self._lines(_PIECES.findall(self._held.rstrip()), width)
        self.column, self._held = 0, ""
        return rest

    def _lines(self, pieces: Sequence[str], width: int) -> str:
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
