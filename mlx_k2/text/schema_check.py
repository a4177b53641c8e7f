"""Check of a JSON schema before it is compiled: that it is one, and that it has a finite value."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from mlx_k2.errors import RequestError

_MAX_VISITS = 100_000


def check_schema(schema: object, what: str) -> None:
    """Check a parsed schema, which ``what`` names in errors.

    Raises:
        RequestError: it is no schema, refers to itself without end, or is too intricate to tell.
    """
    if not isinstance(schema, Mapping):
        raise RequestError(f"{what} is no JSON schema: give a JSON object")
    try:
        is_finite = _Walk(schema).is_finite(schema)
    except RecursionError:
        raise RequestError(f"{what} is too intricate: its references are nested too deep") from None
    if not is_finite:
        raise RequestError(f"{what} has no finite value: it refers to itself without end")


class _Walk:
    """A search for a finite value. A reference that needs itself has none on that path."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._open: set[str] = set()
        self._finite: set[str] = set()
        self._visits_left = _MAX_VISITS

    def is_finite(self, schema: object) -> bool:
        """Return whether ``schema`` has a finite value; True for what the compiler refuses by itself."""
        if not isinstance(schema, Mapping):
            return True
        self._visits_left -= 1
        if not self._visits_left:
            raise RecursionError
        reference = schema.get("$ref")
        if isinstance(reference, str) and not self._is_finite_reference(reference):
            return False
        alternatives = [found for key in ("anyOf", "oneOf") if (found := _items(schema.get(key)))]
        return (
            all(self.is_finite(part) for part in _items(schema.get("allOf")))
            and all(any(self.is_finite(one) for one in options) for options in alternatives)
            and all(self.is_finite(part) for part in _required_parts(schema))
        )

    def _is_finite_reference(self, reference: str) -> bool:
        if reference in self._finite:
            return True
        if reference in self._open:
            return False
        self._open.add(reference)
        found = self.is_finite(self._target(reference))
        self._open.discard(reference)
        if found:
            self._finite.add(reference)
        return found

    def _target(self, reference: str) -> object:
        """Return what a JSON pointer refers to; None if there is nothing, which the compiler refuses."""
        found: Any = self._root
        if reference != "#" and not reference.startswith("#/"):
            return None
        for key in reference.split("/")[1:]:
            name = unquote(key).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                found = found.get(name) if isinstance(found, Mapping) else None
        return found


def _required_parts(schema: Mapping[str, Any]) -> list[object]:
    """Return the schemas of values that every value of ``schema`` contains."""
    kind = schema.get("type")
    if kind in ("object", ["object"]):
        properties = schema.get("properties")
        names = [name for name in _items(schema.get("required")) if isinstance(name, str)]
        return [properties.get(name) for name in names] if isinstance(properties, Mapping) else []
    least = schema.get("minItems")
    if kind in ("array", ["array"]) and isinstance(least, int) and least > 0:
        first = _items(schema.get("prefixItems"))[:least]
        return [*first, schema.get("items")] if len(first) < least else first
    return []


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
