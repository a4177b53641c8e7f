"""Text without control characters, which a terminal would execute. Knows no console and no commands."""

import json
import re
from typing import Any

import msgspec

# The C0 and C1 control characters except line ends and tabs, and lone surrogates, which no encoding can write.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# The characters with Unicode's property Default_Ignorable_Code_Point that str.isprintable accepts, and blank braille.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_DELETE_AND_C1 = re.compile("[\x7f-\x9f]")


def printable(text: str) -> str:
    """Return ``text`` with each control character replaced by U+FFFD; line ends and tabs stay."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def visible(text: str) -> str:
    r"""Return ``text`` with each control, bidirectional and invisible character as an escape, for instance \u202e."""
    return "".join(char if char.isprintable() and not _INVISIBLE.match(char) else _escape(char) for char in text)


def json_line(value: Any) -> str:
    """Return ``value`` as a line of JSON that is safe on a terminal: control characters are escaped."""
    return _DELETE_AND_C1.sub(lambda match: _escape(match.group()), msgspec.json.encode(value).decode()) + "\n"


def escaped_json(value: object) -> str:
    """Return ``value`` as JSON. Invisible characters are escaped, letters of all scripts are not."""
    return visible(json.dumps(value, ensure_ascii=False))


def _escape(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
