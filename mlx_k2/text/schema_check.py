"""Check of a JSON schema before it is compiled: that it is one, and that it has a finite value."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from mlx_k2.errors import RequestError

_MAX_VISITS = 100_000


def check_schema(schema: object, what: str) -> None:
    """Check a parsed schema, which ``what`` names in errors.

    Raises:
        RequestError: it is not a schema, refers to itself without end, or is too complex to check.
    """
    if not isinstance(schema, Mapping):
        raise RequestError(f"{what} is not a JSON schema: give a JSON object")
    try:
        is_finite = _Walk(schema).is_finite(schema)
    except RecursionError:
        raise RequestError(f"{what} is too complex: its references are nested too deep") from None
    if not is_finite:
        raise RequestError(f"{what} has no finite value: it refers to itself without end")


class _Walk:
    """A search for a finite value. A reference that needs itself has none on that path."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._is_finite: dict[str, bool] = {}
        self._visits_left = _MAX_VISITS

    def is_finite(self, schema: object) -> bool:
        """Return whether ``schema`` has a finite value; True for what the compiler refuses by itself."""
        if not isinstance(schema, Mapping):
            return True
        self._visits_left -= 1
        if not self._visits_left:
            raise RecursionError
        alternatives = [found for key in ("anyOf", "oneOf") if (found := _items(schema.get(key)))]
        needed = [*_items(schema.get("allOf")), *_required_parts(schema)]
        return (
            self._refers_to_finite(schema.get("$ref"))
            and all(any(map(self.is_finite, options)) for options in alternatives)
            and all(map(self.is_finite, needed))
        )

    def _refers_to_finite(self, reference: object) -> bool:
        """Follow a JSON pointer. While it is followed, it counts as endless."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return True
        if reference not in self._is_finite:
            self._is_finite[reference] = False
            found: Any = self._root
            for key in reference.split("/")[1:]:
                name = unquote(key).replace("~1", "/").replace("~0", "~")
                if isinstance(found, list):
                    found = {str(index): item for index, item in enumerate(found)}
                found = found.get(name) if isinstance(found, Mapping) else None
            if self.is_finite(found):
                self._is_finite[reference] = True
            else:
                del self._is_finite[reference]
                return False
        return self._is_finite[reference]


def _required_parts(schema: Mapping[str, Any]) -> list[object]:
    """Return the schemas of values that every value of ``schema`` contains."""
    kind, properties, least = schema.get("type"), schema.get("properties"), schema.get("minItems")
    if kind in ("object", ["object"]) and isinstance(properties, Mapping):
        return [properties.get(name) for name in _items(schema.get("required")) if isinstance(name, str)]
    if kind in ("array", ["array"]) and isinstance(least, int) and least > 0:
        first = _items(schema.get("prefixItems"))[:least]
        return [*first, schema.get("items")] if len(first) < least else first
    return []


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
