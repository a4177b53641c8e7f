"""Random JSON schemas: nested containers of the keywords that the grammar compiler knows, with names beyond ASCII."""

from typing import Any

from hypothesis import strategies as st

DEFINITIONS = {
    "tree ü": {
        "type": ["object", "null"],
        "properties": {"枝": {"type": "array", "items": {"$ref": "#/$defs/tree ü"}, "maxItems": 2}},
        "additionalProperties": False,
    }
}
"""The ``$defs`` of every schema."""

_leaves = st.one_of(
    st.fixed_dictionaries({"type": st.just("string")}, optional={"maxLength": st.integers(0, 5)}),
    st.fixed_dictionaries({"type": st.just("integer")}, optional={"minimum": st.integers(-9, 0)}),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": ["a", 'b"', 3]}, {"const": {"k": [1, None]}}]),
    st.builds(dict, type=st.just("string"), pattern=st.sampled_from(["^[a-f]{2,4}$", r"^\d{3}-\w$", "^(foo|bär)$"])),
    st.builds(dict, type=st.just("string"), format=st.sampled_from(["date", "time", "uuid", "ipv4", "email"])),
    st.builds(
        dict,
        enum=st.lists(st.sampled_from(["a", "ü", 1, 2.5, None, True, {"$ref": "ü"}, [], -0.5]), min_size=1),
        description=st.just("d" * 5000),
    ),
    st.sampled_from([{"type": ["string", "null"], "maxLength": 3}, {"$ref": "#/$defs/tree ü"}, {"multipleOf": 5}]),
)


def _containers(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "b c", "ü", 'q"', "x/y"])
    objects = st.builds(
        lambda properties, num_required, additional: {
            "type": "object",
            "properties": properties,
            "required": sorted(properties)[:num_required],
            "additionalProperties": additional,
        },
        st.dictionaries(names, inner, max_size=3),
        st.integers(0, 3),
        st.booleans(),
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array"), "items": inner},
        optional={
            "minItems": st.integers(0, 2),
            "maxItems": st.integers(2, 3),
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
        },
    )
    any_of = st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)})
    one_of = st.builds(lambda x, y: {"oneOf": [_tagged("x", x), _tagged("y", y)]}, inner, inner)
    all_of = st.builds(lambda x, z: {"allOf": [_tagged("x", x), {"properties": {"z": z}}]}, inner, inner)
    return st.one_of(objects, arrays, any_of, one_of, all_of)


def _tagged(name: str, schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": name}, name: schema}, "required": ["kind", name]}


schemas = st.recursive(_leaves, _containers, max_leaves=6).map(lambda schema: schema | {"$defs": DEFINITIONS})
"""Strategy of the schemas."""
