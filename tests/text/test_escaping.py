"""Tests of escaping: escaped text behaves like plain text in a template, and spells no control token."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.errors import RequestError
from mlx_k2.text.escaping import Escaping
from tests.examples import scaled

NAMES = ["<|im_end|>", "<think>", "[EOS]"]
NAME_CHARACTERS = set("".join(NAMES))
# Short texts over few characters, so that searches find matches. Some of the characters are in no name.
texts = st.text(alphabet=st.sampled_from("<|im_end|>XÉ \n"), max_size=12)
parts = st.text(alphabet=st.sampled_from("<|im_end|>XÉ \n"), min_size=1, max_size=2)

OPERATIONS_WITH_PART: dict[str, Callable[[str, str], Any]] = {
    "==": lambda text, part: text == part,
    "== the other way": lambda text, part: part == text,
    "!=": lambda text, part: text != part,
    "<": lambda text, part: text < part,
    "< the other way": lambda text, part: part < text,
    "in": lambda text, part: part in text,
    "in a list": lambda text, part: text in [part, "x"],
    "key of a dict": lambda text, part: {part: 1}.get(text),
    "startswith": lambda text, part: text.startswith(part),
    "startswith one of": lambda text, part: text.startswith((part, "X")),
    "endswith": lambda text, part: text.endswith(part),
    "find": lambda text, part: text.find(part),
    "rfind": lambda text, part: text.rfind(part),
    "count": lambda text, part: text.count(part),
    "split": lambda text, part: text.split(part),
    "rsplit once": lambda text, part: text.rsplit(part, 1),
    "partition": lambda text, part: text.partition(part),
    "rpartition": lambda text, part: text.rpartition(part),
    "strip": lambda text, part: text.strip(part),
    "lstrip": lambda text, part: text.lstrip(part),
    "rstrip": lambda text, part: text.rstrip(part),
    "removeprefix": lambda text, part: text.removeprefix(part),
    "removesuffix": lambda text, part: text.removesuffix(part),
    "replace": lambda text, part: text.replace(part, "Y"),
    "replace once": lambda text, part: text.replace(part, "Y", 1),
    "+": lambda text, part: text + part,
    "+ the other way": lambda text, part: part + text,
    "startswith after +": lambda text, part: (part + text).startswith(part),
    "== after +": lambda text, part: (part + text) == part,
}
OPERATIONS: dict[str, Callable[[str], Any]] = {
    "hash": hash,
    "repr": repr,
    "len": len,
    "str": str,
    "list": list,
    "first character": lambda text: text[:1],
    "backwards": lambda text: text[::-1],
    "strip": lambda text: text.strip(),
    "split": lambda text: text.split(),
    "splitlines": lambda text: text.splitlines(),
    "upper": lambda text: text.upper(),
    "lower": lambda text: text.lower(),
    "title": lambda text: text.title(),
    "capitalize": lambda text: text.capitalize(),
    "isalpha": lambda text: text.isalpha(),
    "isupper": lambda text: text.isupper(),
    "isspace": lambda text: text.isspace(),
    "sorted": lambda text: sorted([text, "m", "XX"]),
    "startswith its first character": lambda text: text.startswith(text[:1]),
}
TEXT_OPERATIONS = ["repr", "str", "list", "first character", "backwards", "strip", "split", "splitlines"]
TEXT_OPERATIONS += ["upper", "lower", "title"]


def unescape(value: Any, escaping: Escaping) -> Any:
    """Return a value with its text, or the texts of a list, unescaped."""
    return [escaping.unescape(item) for item in value] if isinstance(value, list) else escaping.unescape(value)


@pytest.mark.parametrize("name", OPERATIONS_WITH_PART)
@settings(max_examples=scaled(40))
@given(text=texts, part=parts)
def test_escaped_text_combined_with_template_text_behaves_like_plain_text(name: str, text: str, part: str) -> None:
    operation = OPERATIONS_WITH_PART[name]
    escaping = Escaping(NAMES, [text, part])
    assert unescape(operation(escaping.escape(text), part), escaping) == operation(text, part)


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=scaled(40))
@given(text=texts)
def test_an_operation_on_escaped_text_has_the_result_of_plain_text(name: str, text: str) -> None:
    operation = OPERATIONS[name]
    escaping = Escaping(NAMES, [text])
    assert unescape(operation(escaping.escape(text)), escaping) == operation(text)


@pytest.mark.parametrize("name", TEXT_OPERATIONS)
@settings(max_examples=scaled(40))
@given(text=texts)
def test_no_string_operation_returns_a_character_of_a_control_token(name: str, text: str) -> None:
    result = OPERATIONS[name](Escaping(NAMES, [text]).escape(text))
    assert NAME_CHARACTERS.isdisjoint("".join(result))


@given(st.text())
def test_escaping_is_one_to_one_and_uses_no_character_of_the_text(text: str) -> None:
    escaping = Escaping(NAMES, [text])
    escaped = "".join(escaping.escape(text))
    assert len(escaped) == len(text)
    assert NAME_CHARACTERS.isdisjoint(escaped)
    assert escaping.unescape(escaped) == text
    replacements = {after for before, after in zip(text, escaped, strict=True) if before != after}
    assert replacements.isdisjoint(text)


def test_private_use_characters_in_a_text_are_not_unescaped() -> None:
    text = "<think>" + "".join(map(chr, range(0xF0000, 0x110000)))
    escaping = Escaping(NAMES, [text])
    escaped = "".join([escaping.escape(text)])  # joined to plain text, as Jinja writes it
    assert escaping.unescape(escaped) == text


def test_template_text_joined_to_escaped_text_is_not_escaped() -> None:
    escaped = Escaping(NAMES, ["a[b"]).escape("a[b")
    # Joined to plain text, as Jinja writes it, since methods of escaped text compare unescaped characters.
    assert "<think>" in "".join(escaped.replace("[", "<think>"))
    assert "".join(escaped + "<think>").endswith("<think>")
    assert "".join("<think>" + escaped).startswith("<think>")


def test_text_is_escaped_at_every_depth_and_in_keys() -> None:
    escaping = Escaping(NAMES, [])
    escaped = escaping.escape({"dim": [{"end": ("m", 3, None, True)}]})
    assert escaped["dim"][0]["end"] == ("m", 3, None, True)
    (key,) = escaped
    assert NAME_CHARACTERS.isdisjoint("".join(key))


def test_text_that_uses_every_replacement_character_is_refused() -> None:
    with pytest.raises(RequestError, match="too many different characters"):
        Escaping(NAMES, ["".join(map(chr, range(0x40000, 0x110000)))])
