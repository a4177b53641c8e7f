"""Escaping of message text while a template renders it, so that message text cannot spell a control token.

Each character that occurs in a control token's name is replaced by one character that occurs nowhere in the rendering.
Even if the template changes message text or joins it with its own, a control token's name in the rendering is always
text of the template. Knows neither messages nor templates.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mlx_k2.errors import RequestError

# The private-use planes come first. Planes down to 4 follow, which have no assigned characters, for a prompt
# that uses all private-use ones.
_CANDIDATES = range(0x10FFFD, 0x3FFFF, -1)
_CHUNK_CHARS = 4096


class Escaping:
    """A replacement of each character of ``names`` by a character that occurs in none of ``texts``."""

    def __init__(self, names: Iterable[str], texts: Iterable[str]) -> None:
        used = {ord(character) for text in texts for chunk in _chunks(text) for character in set(chunk)}
        letters = sorted({ord(letter) for name in names for letter in name})
        free = (candidate for candidate in _CANDIDATES if candidate not in used)
        self._escape_table = dict(zip(letters, free, strict=False))
        if len(self._escape_table) < len(letters):
            raise RequestError("the messages use too many different characters: none is left for escaping")
        self._unescape_table = {escaped: letter for letter, escaped in self._escape_table.items()}

    def escape(self, value: object) -> Any:
        """Return ``value`` with each text in it, at any depth and in keys too, as EscapedText."""
        match value:
            case str():
                return EscapedText(_translate(value, self._escape_table), self)
            case dict():
                return {self.escape(key): self.escape(item) for key, item in value.items()}
            case list():
                return [self.escape(item) for item in value]
            case tuple():
                return tuple(self.escape(item) for item in value)
        return value

    def wrap(self, value: object) -> Any:
        """Return ``value``, the result of an operation on escaped text, with each str in it as EscapedText."""
        match value:
            case str():
                return EscapedText(value, self)
            case list():
                return [self.wrap(item) for item in value]
            case tuple():
                return tuple(self.wrap(item) for item in value)
        return value

    def unescape(self, value: object) -> Any:
        """Return the original text of ``value``, a text or a tuple; return a value of another type unchanged."""
        match value:
            case str():
                return _translate(value, self._unescape_table)
            case tuple():
                return tuple(self.unescape(item) for item in value)
        return value


def _translate(text: str, table: Mapping[int, int]) -> str:
    return "".join(chunk.translate(table) for chunk in _chunks(text))


def _chunks(text: str) -> Iterator[str]:
    """Yield ``text`` in chunks, so that other threads can run: translating 400,000 characters takes 15 ms."""
    return (text[start : start + _CHUNK_CHARS] for start in range(0, len(text), _CHUNK_CHARS))


class EscapedText(str):
    """Escaped text whose methods compare, search and split like those of the original text.

    It is a str, because templates test for str and join it with other text; its characters then stay escaped. An
    operation that this class does not handle cannot make a control token. It can make the rendering differ from that of
    plain text; `prompt.py` compares the two and refuses the prompt.
    """

    __slots__ = ("_escaping",)
    _escaping: Escaping

    def __new__(cls, escaped: str, escaping: Escaping) -> "EscapedText":
        """Return ``escaped`` as EscapedText: its message text is escaped, text of the template in it is not."""
        text = super().__new__(cls, escaped)
        text._escaping = escaping
        return text

    def __getnewargs__(self) -> tuple[str, Escaping]:  # type: ignore[override]
        # For pickle, which sends the text to the process that renders. join makes a plain str; str() would return self.
        return "".join((self,)), self._escaping

    def __str__(self) -> str:
        return self

    def __iter__(self) -> Iterator[str]:
        return (EscapedText(character, self._escaping) for character in super().__iter__())

    def __add__(self, after: str) -> "EscapedText":
        return EscapedText(str.__add__(self, after), self._escaping)

    def __radd__(self, before: str) -> "EscapedText":
        return EscapedText(str.__add__(before, self), self._escaping)

    def replace(self, old: str, new: str, count: int = -1, /) -> "EscapedText":  # type: ignore[override]
        """Replace like str.replace. ``new`` is text of the template and stays unescaped."""
        return EscapedText(str.replace(self, self._escaping.escape(old), new, count), self._escaping)


def _on_unescaped(name: str) -> Callable[..., object]:
    """Return a method that computes str's method ``name`` on the original text, and escapes the result."""
    operation = getattr(str, name)

    def method(self: EscapedText, *arguments: object) -> object:
        escaping = self._escaping
        return escaping.escape(operation(escaping.unescape(self), *map(escaping.unescape, arguments)))

    return method


def _on_escaped(name: str) -> Callable[..., object]:
    """Return a method that computes str's method ``name`` on the escaped characters, with escaped arguments."""
    operation = getattr(str, name)

    def method(self: EscapedText, *arguments: object) -> object:
        escaping = self._escaping
        return escaping.wrap(operation(self, *map(escaping.escape, arguments)))

    return method


_ON_UNESCAPED = (
    "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ __repr__ __contains__ startswith endswith find rfind index "
    "rindex count lower upper title capitalize swapcase casefold isalpha isalnum isascii isdecimal isdigit "
    "isidentifier islower isnumeric isprintable isspace istitle isupper"
)
_ON_ESCAPED = "__getitem__ split rsplit splitlines partition rpartition strip lstrip rstrip removeprefix removesuffix"
for _name in _ON_UNESCAPED.split():
    setattr(EscapedText, _name, _on_unescaped(_name))
for _name in _ON_ESCAPED.split():
    setattr(EscapedText, _name, _on_escaped(_name))
