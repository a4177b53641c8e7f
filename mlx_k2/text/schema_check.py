"""Check of a JSON schema before it is compiled: it must be an object, and must allow a finite value."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from mlx_k2.errors import RequestError

_MAX_VISITS = 100_000


def check_schema(schema: object, what: str) -> None:
    """Check a parsed schema; ``what`` names it in errors.

    Raises:
        RequestError: the schema is not a JSON object, has only infinite values, or is too complex to check.
    """
    if not isinstance(schema, Mapping):
        raise RequestError(f"{what} is not a JSON schema: give a JSON object")
    try:
        is_finite = _FiniteValueSearch(schema).has_finite_value(schema)
    except RecursionError:
        raise RequestError(f"{what} is too complex: its references are too many, or nested too deep") from None
    if not is_finite:
        raise RequestError(f"{what} has no finite value: it refers to itself without end")


class _FiniteValueSearch:
    """A search for a finite value of a schema. While a reference is followed, it counts as infinite."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._is_finite: dict[str, bool] = {}
        """By reference: True if it is finite, False while it is followed."""
        self._visits_left = _MAX_VISITS

    def has_finite_value(self, schema: object) -> bool:
        """Return whether ``schema`` has a finite value; True for a malformed part, which the compiler refuses."""
        if not isinstance(schema, Mapping):
            return True
        self._visits_left -= 1
        if not self._visits_left:
            raise RecursionError
        if not self._refers_to_finite(schema.get("$ref")):
            return False
        for keyword in ("anyOf", "oneOf"):
            alternatives = _items(schema.get(keyword))
            if alternatives and not any(map(self.has_finite_value, alternatives)):
                return False
        return all(map(self.has_finite_value, [*_items(schema.get("allOf")), *_required_parts(schema)]))

    def _refers_to_finite(self, reference: object) -> bool:
        """Return whether the part at a JSON pointer has a finite value; True for other references."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return True
        if reference not in self._is_finite:
            self._is_finite[reference] = False
            part: Any = self._root
            for key in reference.split("/")[1:]:
                name = unquote(key).replace("~1", "/").replace("~0", "~")
                if isinstance(part, list):
                    part = {str(index): item for index, item in enumerate(part)}
                part = part.get(name) if isinstance(part, Mapping) else None
            if not self.has_finite_value(part):
                del self._is_finite[reference]  # not kept: it may be infinite only while an outer one is followed
                return False
            self._is_finite[reference] = True
        return self._is_finite[reference]


def _required_parts(schema: Mapping[str, Any]) -> list[object]:
    """Return the schemas of the parts that every value of ``schema`` has."""
    kind, properties, min_items = schema.get("type"), schema.get("properties"), schema.get("minItems")
    if kind in ("object", ["object"]) and isinstance(properties, Mapping):
        return [properties.get(name) for name in _items(schema.get("required")) if isinstance(name, str)]
    if kind in ("array", ["array"]) and isinstance(min_items, int) and min_items > 0:
        first = _items(schema.get("prefixItems"))[:min_items]
        return [*first, schema.get("items")] if len(first) < min_items else first
    return []


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
