"""The one reader of JSON as a value of a known type. Knows no files."""

import re
import threading
from typing import TypeVar

import msgspec

from mlx_k2.json_text.parse import JsonError, parse_json

Value = TypeVar("Value")

_lock = threading.Lock()
_used: set[object] = set()
_PATH = re.compile(r" - at (?:`key` in )?`\$(?P<path>.*)`$")
_KINDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_TYPES = re.compile(rf"`((?:{'|'.join(_KINDS)})(?: \| (?:{'|'.join(_KINDS)}))*)`")


def read_json(text: bytes | str, kind: type[Value], *, has_comments: bool = False) -> Value:
    """Return the value of a JSON text as ``kind``, a type that msgspec converts to. See `parse_json` for comments.

    Raises:
        JsonError: the text is not JSON (`parse_json`), or has no such value; names the line or the field.
    """
    return convert(parse_json(text, has_comments=has_comments), kind)


def convert(value: object, kind: type[Value], *, str_keys: bool = True) -> Value:
    """Return a parsed value as ``kind``. ``str_keys`` False: a key that is a number is not text, as in Python's values.

    Raises:
        JsonError: it has another type; names the field.
    """
    with _lock:  # msgspec 0.22 crashes if two threads use a struct for the first time at once
        if kind not in _used:
            msgspec.json.Decoder(kind)  # makes msgspec read the struct's fields
            _used.add(kind)
    try:
        return msgspec.convert(value, kind, str_keys=str_keys)
    except msgspec.ValidationError as error:
        raise JsonError(_with_json_words(error)) from None


def _with_json_words(error: msgspec.ValidationError) -> str:
    """Return msgspec's message with the field first, and with the words of JSON for types."""
    text = str(error)
    found = _PATH.search(text)
    if found is not None:
        text = f"{found['path'].strip('.') or 'the whole'}: {text[: found.start()]}"
    return _TYPES.sub(_name_kinds, text).replace("Expected", "expected").replace("Object ", "")


def _name_kinds(found: re.Match[str]) -> str:
    return " or ".join(_KINDS[kind] for kind in found[1].split(" | "))
