"""The reader of JSON as a value of a given type. Knows no files."""

import re
import threading
from typing import TypeVar

import msgspec

from mlx_k2.json_text.parse import JsonError, parse_json

Value = TypeVar("Value")

_lock = threading.Lock()
_initialized_types: set[object] = set()
_FIELD_PATH = re.compile(r" - at (?:`key` in )?`\$(?P<path>.*)`$")
_WORDS_BY_TYPE = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_MSGSPEC_TYPES = re.compile(rf"`((?:{'|'.join(_WORDS_BY_TYPE)})(?: \| (?:{'|'.join(_WORDS_BY_TYPE)}))*)`")


def read_json(text: bytes | str, kind: type[Value], *, allow_comments: bool = False) -> Value:
    """Return the value of a JSON text as ``kind``, a type that msgspec supports.

    Raises:
        JsonError: the text is not JSON as ``parse_json`` reads it, or has a value of another type; names the line or
            the field.
    """
    return convert(parse_json(text, allow_comments=allow_comments), kind)


def convert(value: object, kind: type[Value], *, str_keys: bool = True) -> Value:
    """Return a parsed value as ``kind``.

    With ``str_keys`` the keys of objects in ``value`` are text, as in JSON, also where ``kind`` has int keys.

    Raises:
        JsonError: the value has another type; names the field.
    """
    with _lock:  # msgspec 0.22 crashes if two threads use a struct for the first time at the same time
        if kind not in _initialized_types:
            msgspec.json.Decoder(kind)  # initializes msgspec's information about the type
            _initialized_types.add(kind)
    try:
        return msgspec.convert(value, kind, str_keys=str_keys)
    except msgspec.ValidationError as error:
        raise JsonError(_with_json_words(error)) from None


def _with_json_words(error: msgspec.ValidationError) -> str:
    """Return msgspec's message with plain words for types, after the field's path; "the whole" for the value itself."""
    text = str(error)
    match = _FIELD_PATH.search(text)
    if match is not None:
        text = f"{match['path'].strip('.') or 'the whole'}: {text[: match.start()]}"
    # "Object missing required field" becomes "missing required field", for instance.
    return _MSGSPEC_TYPES.sub(_in_words, text).replace("Expected", "expected").replace("Object ", "")


def _in_words(match: re.Match[str]) -> str:
    return " or ".join(_WORDS_BY_TYPE[name] for name in match[1].split(" | "))
