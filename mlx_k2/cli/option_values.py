"""Conversion of the command line's values, and of a command's options to one struct. Knows no option."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from mlx_k2.bounded_read import read_file
from mlx_k2.cli.profile import with_sources
from mlx_k2.errors import RequestError, SetupError
from mlx_k2.json_text.parse import JsonError, parse_json
from mlx_k2.json_text.read import convert

_MAX_DIGITS = 9  # of a number in a list; a number with more digits is refused

Options = TypeVar("Options", bound=msgspec.Struct)


def with_struct(struct_type: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Return a decorator that calls a command with its options as one checked ``struct_type``.

    A field whose type is a struct gets the options that are that struct's fields.
    """

    def decorate(command: Callable[[Options], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call_with_struct(**values: Any) -> None:
            fields = _pop_fields(struct_type, values)
            assert not values, f"{struct_type.__name__} has no field for {', '.join(values)}"
            try:
                options = convert(fields, struct_type)
            except JsonError as error:
                raise RequestError(str(error)) from None
            except SetupError as error:
                raise RequestError(with_sources(str(error))) from None
            except click.UsageError as error:
                raise click.UsageError(with_sources(error.message)) from None
            command(options)

        return call_with_struct

    return decorate


def _pop_fields(struct_type: type[msgspec.Struct], values: dict[str, Any]) -> dict[str, Any]:
    """Remove the values of the struct's fields from ``values``; return them by the fields' names in JSON."""
    fields = {}
    for field in msgspec.structs.fields(struct_type):
        is_struct = isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
        if is_struct:
            fields[field.encode_name] = _pop_fields(field.type, values)
        elif field.name in values:
            fields[field.encode_name] = values.pop(field.name)
    return fields


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers of at least ``minimum``, separated by commas, as in ``example``."""

    name = "N,N,..."

    def __init__(self, minimum: int, example: str) -> None:
        self._minimum = minimum
        self._example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the numbers as a tuple."""
        words = [word.strip() for word in str(value).split(",")]
        for word in words:
            is_number = word.isascii() and word.isdigit() and len(word) <= _MAX_DIGITS
            if not is_number or int(word) < self._minimum:
                name = "" if param is None else f"{param.opts[0]}: "
                raise RequestError(
                    f"{name}{word[: _MAX_DIGITS + 1]!r} is not a whole number from {self._minimum}: write numbers with "
                    f"commas, as in {self._example}"
                )
        return tuple(map(int, words))


class RestartLimit(click.IntRange):
    """A number of restarts, or ``off`` for 0."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number; 0 for ``off``."""
        return 0 if value == "off" else int(super().convert(value, param, ctx))


def is_on(ctx: click.Context, param: click.Parameter, value: str | None) -> bool | None:
    """Return False for the value ``off``, True for other values, None for an option that is not given."""
    return None if value is None else value != "off"


def schema_from_file(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """Return the JSON value in the file ``value``; None for an option that is not given."""
    text = text_from_file(ctx, param, value)
    try:
        return None if text is None else parse_json(text)
    except JsonError as error:
        raise RequestError(f"--json-schema: {value}: {error}") from None


def text_from_file(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Return the text of the file ``value``; None for an option that is not given."""
    if value is None:
        return None
    try:
        return read_file(Path(value)).decode()
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RequestError(f"{param.opts[0]}: {value} cannot be read: {problem}") from None


def logit_biases(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[int, float]:
    """Return the biases by token id of values such as ``42=-10``."""
    biases: dict[int, float] = {}
    for value in values:
        id_text, _, bias_text = value.partition("=")
        try:
            token_id, bias = int(id_text), float(bias_text)
        except ValueError:
            raise RequestError(f"--logit-bias {value!r}: write a token id and a number, as in 42=-10") from None
        if token_id in biases:
            raise RequestError(f"--logit-bias {value!r}: token {token_id} has a bias already")
        biases[token_id] = bias
    return biases
