"""Checked copies of JSON values from outside. Knows neither messages nor tools."""

from collections.abc import Mapping
from typing import Any

from mlx_k2.errors import RequestError
from mlx_k2.text.tokenizer import well_formed

_MAX_DEPTH = 100


def copied_json(value: object, where: str, *, sort: bool = False, depth: int = 0) -> Any:
    """Return a deep copy of a JSON value, with its text made well-formed; ``sort`` sorts the keys of every object.

    Raises:
        RequestError: JSON cannot hold the value, or it is nested too deep; ``where`` names it in the message.
    """
    require(depth <= _MAX_DEPTH, f"{where} is nested more than {_MAX_DEPTH} deep")
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return well_formed(value)
        case Mapping():
            require(all(isinstance(key, str) for key in value), f"{where}: the keys of an object must be text")
            items = sorted(value.items()) if sort else value.items()
            return {well_formed(key): copied_json(item, where, sort=sort, depth=depth + 1) for key, item in items}
        case list() | tuple():
            return [copied_json(item, where, sort=sort, depth=depth + 1) for item in value]
    raise RequestError(f"{where}: JSON cannot hold {value!r}")


def require(holds: bool, message: str) -> None:
    """Raise RequestError(``message``) unless ``holds``."""
    if not holds:
        raise RequestError(message)
