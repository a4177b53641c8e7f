"""The parser of all JSON from outside. Imports the standard library only, since the guard imports it."""

import codecs
import json
import math
import re
import sys
from itertools import chain
from typing import Any

MAX_BYTES = 256 * 1024 * 1024
"""The limit for bytes. A text that is a ``str`` already is in memory, and has no limit."""
MAX_DEPTH = 100
"""The most objects and lists inside each other."""


class JsonError(ValueError):
    """The error for text that is not valid JSON. The message names the problem, and often its line or field."""


# Group 1 is a text in quotes, which is kept. The rest is a comment, or a comma before a closing bracket.
_COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_LAST_COMMA = re.compile(r'("(?:\\.|[^"\\\n])*")|,(?=\s*[}\]])', re.DOTALL)


def parse_json(text: bytes | str, *, is_lenient: bool = False, allow_comments: bool = False) -> Any:
    """Return the value of a JSON text, which may begin with a byte order mark.

    ``is_lenient`` accepts what a grammar of JSON cannot exclude: a key that occurs twice in one object (the last value
    counts), and a number beyond the range of floats, which becomes the nearest float. ``allow_comments``
    accepts comments and a comma after the last item, which settings of editors have.

    Raises:
        JsonError: the text is not JSON in UTF-8, is larger than MAX_BYTES or nested deeper than MAX_DEPTH, or has an
            escaped lone surrogate; unless ``is_lenient`` also for a key that occurs twice and a number beyond floats.
    """
    text = _decode(text) if isinstance(text, bytes) else text.removeprefix("\ufeff")
    if not text.strip():
        raise JsonError("it is empty")
    if allow_comments:
        text = _LAST_COMMA.sub(_blank, _COMMENT.sub(_blank, text))
    try:
        value = json.loads(
            text,
            object_pairs_hook=dict if is_lenient else _object_without_repeated_keys,
            parse_float=_nearest_float if is_lenient else _finite_float,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        # Some of json's messages end with "at", before a position.
        problem = f"{error.msg[0].lower()}{error.msg[1:].removesuffix(' at')}"
        raise JsonError(f"{line}column {error.colno}: {problem}") from None
    except RecursionError:
        raise _too_deep() from None
    except JsonError:
        raise
    except ValueError:  # an int of more digits than Python converts
        raise JsonError("a number has too many digits") from None
    _check_depth(value)
    if "\\ud" in text or "\\uD" in text:
        _check_surrogates(value)
    return value


def _decode(data: bytes) -> str:
    if len(data) > MAX_BYTES:
        raise JsonError(f"it has {len(data)} bytes, and at most {MAX_BYTES} are read")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise JsonError("it is UTF-16: save it as UTF-8")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        line = f"line {number}: " if b"\n" in data.strip() else ""
        raise JsonError(f"{line}byte 0x{data[error.start]:02x} is not UTF-8") from None


def _blank(match: re.Match[str]) -> str:
    """Return a text in quotes unchanged; replace all characters of any other text but line ends by spaces."""
    return match[1] or re.sub(r"[^\n]", " ", match[0])


def _object_without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise JsonError(f"the key {json.dumps(name)} occurs twice in one object")
        fields[name] = value
    return fields


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError(f"the number {digits[:20]} is too large")
    return value


def _nearest_float(digits: str) -> float:
    return max(-sys.float_info.max, min(float(digits), sys.float_info.max))


def _refuse_constant(name: str) -> None:
    raise JsonError(f"{name} is not JSON")


def _check_depth(value: Any) -> None:
    """Raise JsonError if ``value`` is nested deeper than MAX_DEPTH; go through it level by level."""
    containers = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        items = chain.from_iterable(parent.values() if isinstance(parent, dict) else parent for parent in containers)
        containers = [item for item in items if isinstance(item, dict | list)]
        if not containers:
            return
    raise _too_deep()


def _too_deep() -> JsonError:
    return JsonError(f"it is nested more than {MAX_DEPTH} deep")


def _check_surrogates(value: Any) -> None:
    """Raise JsonError if a text in ``value`` has a lone surrogate."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        surrogate = error.object[error.start]
        raise JsonError(f"\\u{ord(surrogate):04x} is half of a character: its other half is missing") from None
