"""Tests of reading JSON: what is read, what is refused, and with which message."""

import json
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.json_text.parse import MAX_BYTES, MAX_DEPTH, JsonError, parse_json
from mlx_k2.json_text.read import read_json

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
)


class Inner(msgspec.Struct):
    size: int
    scale: float = 1.0


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    inner: tuple[Inner, ...]
    names: dict[int, str] = {}


@pytest.mark.timeout(10)
def test_a_key_twice_among_many_is_found_in_linear_time() -> None:
    names = [f'"{number}": 0' for number in range(60_000)]
    with pytest.raises(JsonError, match='the key "59999" occurs twice'):
        parse_json("{" + ", ".join([*names, names[-1]]) + "}")


@given(json_values)
def test_json_is_read_back_as_its_value(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert parse_json(text) == value
        assert parse_json(text.encode()) == value
        assert parse_json(b"\xef\xbb\xbf" + text.encode()) == value


@given(json_values, st.sampled_from([" ", '// a "b\n', "/* [1,\n*/", "\n"]))
def test_comments_and_trailing_commas_do_not_change_the_value(value: object, filler: str) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert parse_json(f"{filler}{text}{filler}", allow_comments=True) == value
    with_commas = f'{{"a": [{json.dumps(value)}{filler},{filler}],{filler}}}'
    assert parse_json(with_commas, allow_comments=True) == {"a": [value]}
    with pytest.raises(JsonError):
        parse_json(with_commas)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "it is empty"),
        (b"\xef\xbb\xbf \n", "it is empty"),
        (b'["\x01"]', "column 3: invalid control character"),
        (b'"\xff"', "byte 0xff is not UTF-8"),
        (b'{\n "a": 1,\n "b" 2\n}', "line 3, column 6: expecting ':' delimiter"),
        (b'{"a": 1} x', "column 10: extra data"),
        (b'{"a": "', "column 7: unterminated string"),
        (b'[1,\n"\xff"]', "line 2: byte 0xff is not UTF-8"),
        ("[]".encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        (b'{"b": {"a": 1, "c": 2, "a": 1}}', 'the key "a" occurs twice in one object'),
        (b'["\\ud800"]', r"\\ud800 is half of a character"),
        (b'{"\\uDFFF": 1}', r"\\udfff is half of a character"),
        (b"[NaN]", "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"[1e999]", "the number 1e999 is too large"),
        (b"[" + b"9" * 5000 + b"]", "a number has too many digits"),
        (b"[" * 100_000, f"it is nested more than {MAX_DEPTH} deep"),
        (b'{"a":' * 100_000, f"it is nested more than {MAX_DEPTH} deep"),
        (b"[" * 101 + b"]" * 101, f"it is nested more than {MAX_DEPTH} deep"),
    ],
)
def test_a_text_that_is_not_accepted_is_refused_with_its_problem(text: bytes, problem: str) -> None:
    with pytest.raises(JsonError, match=f"^{problem}"):
        parse_json(text)


def test_lists_nested_as_deep_as_allowed_are_read() -> None:
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert str(parse_json(text)) == text


def test_a_pair_of_surrogates_and_an_escaped_backslash_are_read() -> None:
    assert parse_json(b'"\\ud83d\\ude00 \\\\ud800"') == "\N{GRINNING FACE} \\ud800"


def test_a_text_of_too_many_bytes_is_refused_before_it_is_read() -> None:
    with pytest.raises(JsonError, match=f"at most {MAX_BYTES} are read"):
        parse_json(bytes(MAX_BYTES + 1))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "expected an object, got a list"),
        ({}, "missing required field `inner`"),
        ({"inner": [], "iner": 1}, "contains unknown field `iner`"),
        ({"inner": [{"size": 1}, {"size": "1"}]}, r"inner\[1\].size: expected a whole number, got text"),
        ({"inner": [{"size": 1.5}]}, r"inner\[0\].size: expected a whole number, got a number"),
        ({"inner": [{"size": 1, "scale": None}]}, r"inner\[0\].scale: expected a number, got null"),
        ({"inner": [], "names": {"x": "y"}}, r"names: .*expected a whole number, got text"),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_field(value: Any, problem: str) -> None:
    with pytest.raises(JsonError, match=f"^{problem}"):
        read_json(json.dumps(value), Outer)


def test_a_value_of_the_type_is_returned() -> None:
    assert read_json(b'{"inner": [{"size": 1, "scale": 2}], "names": {"7": "x"}}', Outer) == Outer(
        (Inner(1, 2.0),), {7: "x"}
    )


# msgspec 0.22 crashes, sometimes, at such uses without the lock in `convert`: hence many types and frequent switches.
FIRST_USE_BY_SIX_THREADS = """
import sys, threading
from typing import Annotated
import msgspec
from mlx_k2.json_text.read import convert

def new_type(number):
    fields = [(f"f{field}", Annotated[int, msgspec.Meta(ge=field)]) for field in range(20)]
    parts = [msgspec.defstruct(f"Part{number}_{part}", fields) for part in range(20)]
    return msgspec.defstruct(f"Outer{number}", [(f"part{index}", part) for index, part in enumerate(parts)])

sys.setswitchinterval(1e-6)
value = {f"part{index}": {f"f{field}": field for field in range(20)} for index in range(20)}
for number in range(30):
    struct, barrier = new_type(number), threading.Barrier(6)
    threads = [threading.Thread(target=lambda: (barrier.wait(), convert(value, struct))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


def test_several_threads_may_use_a_type_for_the_first_time_at_once() -> None:
    command = [sys.executable, "-c", FIRST_USE_BY_SIX_THREADS]
    python = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (python.returncode, python.stderr) == (0, "")
