"""Message text in disguise while a template handles it, so that none of it can ever read as a control token.

Every character that occurs in a control token's name is exchanged, one for one, for a character that occurs nowhere
in the rendering. Whatever a template then does with a message's text, alone or between its own words, what spells a
control token's name in the result was written by the template. Knows neither messages nor templates.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mlx_k2.errors import RequestError

# Private-use planes first; a prompt that holds all of those finds others.
_CANDIDATES = range(0x10FFFD, 0x3FFFF, -1)


class Escaping:
    """A one-for-one exchange of the characters of ``names``, for characters that are in none of ``texts``."""

    def __init__(self, names: Iterable[str], texts: Iterable[str]) -> None:
        used = {ord(character) for text in texts for character in set(text)}
        letters = sorted({ord(letter) for name in names for letter in name})
        free = (candidate for candidate in _CANDIDATES if candidate not in used)
        self._escaped = dict(zip(letters, free, strict=False))
        if len(self._escaped) < len(letters):
            raise RequestError("the messages use so many different characters that none is left to mark them with")
        self._unescaped = {escaped: letter for letter, escaped in self._escaped.items()}

    def escape(self, value: object) -> Any:
        """``value`` with all text in it disguised, at any depth, keys too; the text still compares as it reads."""
        match value:
            case str():
                return EscapedText(value.translate(self._escaped), self)
            case dict():
                return {self.escape(key): self.escape(item) for key, item in value.items()}
            case list():
                return [self.escape(item) for item in value]
            case tuple():
                return tuple(self.escape(item) for item in value)
        return value

    def wrap(self, value: object) -> Any:
        """What an operation on disguised text gave, as text that compares as it reads."""
        match value:
            case str():
                return EscapedText(value, self)
            case list():
                return [self.wrap(item) for item in value]
            case tuple():
                return tuple(self.wrap(item) for item in value)
        return value

    def unescape(self, value: object) -> Any:
        """``value`` as it reads, where it is text or a tuple of texts."""
        match value:
            case str():
                return value.translate(self._unescaped)
            case tuple():
                return tuple(self.unescape(item) for item in value)
        return value


class EscapedText(str):
    """Text whose characters are disguised and which still behaves as it reads: templates compare, search and split.

    A str, since templates ask for one and join it with others; joined to plain text the disguise stays in the
    characters. What this class does not foresee shows as a difference from the plain rendering, never as a token.
    """

    __slots__ = ("_escaping",)
    _escaping: Escaping

    def __new__(cls, escaped: str, escaping: Escaping) -> "EscapedText":
        """Text that is in disguise already."""
        text = super().__new__(cls, escaped)
        text._escaping = escaping
        return text

    def __str__(self) -> str:
        return self

    def __iter__(self) -> Iterator[str]:
        return (EscapedText(character, self._escaping) for character in super().__iter__())

    def __add__(self, after: str) -> "EscapedText":
        return EscapedText(str.__add__(self, after), self._escaping)

    def __radd__(self, before: str) -> "EscapedText":
        return EscapedText(str.__add__(before, self), self._escaping)

    def replace(self, old: str, new: str, count: int = -1, /) -> "EscapedText":  # type: ignore[override]
        """As str.replace; ``new`` is the template's and stays as it is."""
        return EscapedText(str.replace(self, self._escaping.escape(old), new, count), self._escaping)


def _on_unescaped(name: str) -> Callable[..., object]:
    """The str method ``name`` computed on the text as it reads, its result disguised again."""
    operation = getattr(str, name)

    def method(self: EscapedText, *arguments: object) -> object:
        escaping = self._escaping
        return escaping.escape(operation(escaping.unescape(self), *map(escaping.unescape, arguments)))

    return method


def _on_escaped(name: str) -> Callable[..., object]:
    """The str method ``name`` computed on the disguised characters, with its text arguments disguised too."""
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
